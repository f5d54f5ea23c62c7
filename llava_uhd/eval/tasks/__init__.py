"""The benchmarks, one file each. To add one: write it, import it, register it here."""

from llava_uhd.eval.task import TASKS
from llava_uhd.eval.tasks.synthetic import Synthetic

TASKS.add(Synthetic.name, Synthetic())

__all__ = ["TASKS"]
