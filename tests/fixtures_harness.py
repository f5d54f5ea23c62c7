"""Stand-ins for lmms-eval and VLMEvalKit, with the interfaces that the adapters use."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

_MODEL = """
import abc

class CacheHook:
    def __init__(self, cache):
        self.seen = []

    def add_partial(self, attr, req, res):
        self.seen.append((attr, req, res))

class lmms(abc.ABC):
    is_simple = True

    def __init__(self):
        self._rank, self._world_size = 0, 1
        self.cache_hook = CacheHook(None)
        self.task_dict = {}

    @abc.abstractmethod
    def loglikelihood(self, requests): ...

    @abc.abstractmethod
    def generate_until(self, requests): ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests): ...

    @property
    def rank(self):
        return self._rank

    @property
    def world_size(self):
        return self._world_size
"""
_REGISTRY = """
from dataclasses import dataclass

@dataclass(frozen=True)
class ModelManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple = ()
"""
_UTILS = '''
class Collator:
    """Groups, sorts within the groups, and finds back."""

    def __init__(self, arr, sort_fn, group_fn=lambda x: x[1], grouping=False):
        groups = {}
        for index, each in enumerate(arr):
            key = repr(sorted(group_fn(each).items())) if grouping else ""
            groups.setdefault(key, []).append((index, each))
        self.groups = [sorted(g, key=lambda pair: sort_fn(pair[1])) for g in groups.values()]
        self.order, self.size = [], len(arr)

    def get_batched(self, n=1, batch_fn=None):
        for group in self.groups:
            self.order += [index for index, _ in group]
            for start in range(0, len(group), n):
                yield [each for _, each in group[start : start + n]]

    def get_original(self, newarr):
        found = dict(zip(self.order, newarr, strict=True))
        return [found[index] for index in range(self.size)]
'''
_PROTOCOL = """
class ChatMessages:
    def __init__(self, messages):
        self.messages = messages

    def extract_media(self):
        parts = [part for message in self.messages for part in message["content"]]
        return tuple([p["url"] for p in parts if p["type"] == kind] for kind in
                     ("image", "video", "audio"))

    def to_hf_messages(self):
        rename = lambda p: p if p["type"] == "text" else {"type": p["type"], p["type"]: p["url"]}
        return [{"role": m["role"], "content": [rename(p) for p in m["content"]]}
                for m in self.messages]
"""
# Leaves with status 0 whatever happens, as the harness does.
_MAIN = """
import json, os, sys
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if os.environ.get("STUB_RESULTS"):
    folder = os.path.join(sys.argv[sys.argv.index("--output_path") + 1], "model")
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "20260101_000000_results.json"), "w") as file:
        json.dump({"results": json.loads(os.environ["STUB_RESULTS"])}, file)
else:
    print("Traceback: it failed")
"""
_LMMS = {
    "lmms_eval/__init__.py": "",
    "lmms_eval/__main__.py": _MAIN,
    "lmms_eval/api/__init__.py": "",
    "lmms_eval/api/model.py": _MODEL,
    "lmms_eval/models/__init__.py": "",
    "lmms_eval/models/registry_v2.py": _REGISTRY,
    "lmms_eval/protocol.py": _PROTOCOL,
    "lmms_eval/utils.py": _UTILS,
}
_BASE = """
import os

class BaseModel:
    INTERLEAVE = False
    allowed_types = ["text", "image"]

    def __init__(self):
        pass

    def use_custom_prompt(self, dataset):
        return False

    def dump_image(self, line, dataset):
        return [os.path.join(os.environ["LMUData"], name) for name in line["image"].split(";")]

    def generate(self, message, dataset=None):
        for item in message:
            assert item["type"] in self.allowed_types
        return self.generate_inner(message, dataset)
"""
# The loop of the kit: its own prompt where the model has none; a data set that fails is skipped.
_RUN = """
import argparse, csv, os
from vlmeval.config import supported_VLM

parser = argparse.ArgumentParser()
parser.add_argument("--data", nargs="+", required=True)
parser.add_argument("--model", nargs="+", required=True)
parser.add_argument("--work-dir", default="./outputs")
parser.add_argument("--judge")
parser.add_argument("--mode", default="all")
parser.add_argument("--verbose", action="store_true")
args = parser.parse_args()

if __name__ == "__main__":
    for name in args.model:
        model = supported_VLM[name]()
        for data in args.data:
            try:
                with open(os.path.join(os.environ["LMUData"], data + ".tsv"), newline="") as file:
                    rows = list(csv.DictReader(file, delimiter="\\t"))
                folder = os.path.join(args.work_dir, name, "T20260101")
                os.makedirs(folder, exist_ok=True)
                for row in rows:
                    if model.use_custom_prompt(data):
                        message = model.build_prompt(row, data)
                    else:
                        images = model.dump_image(row, data)
                        message = [dict(type="image", value=path) for path in images]
                        message.append(dict(type="text", value=row["question"]))
                    row["prediction"] = model.generate(message, data)
                head = os.path.join(folder, name + "_" + data)
                with open(head + ".tsv", "w", newline="") as file:
                    writer = csv.DictWriter(file, list(rows[0]), delimiter="\\t")
                    writer.writeheader()
                    writer.writerows(rows)
                if data != "MMBench_TEST_EN":
                    open(head + "_acc.csv", "w").close()
            except Exception as error:
                print("combination failed:", error)
"""
_KIT = {
    "run.py": _RUN,
    "vlmeval/__init__.py": "",
    "vlmeval/config.py": "supported_VLM = {}\n",
    "vlmeval/vlm/__init__.py": "",
    "vlmeval/vlm/base.py": _BASE,
    "vlmeval/dataset/__init__.py": (
        "def DATASET_TYPE(dataset):\n"
        '    return {"POPE": "Y/N", "MMStar": "MCQ"}.get(dataset, "VQA")\n'
    ),
}


def write_files(folder: Path, files: dict[str, str]) -> Path:
    """Writes files under a folder."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    return folder


def write_lmms(folder: Path) -> Path:
    """lmms-eval's stand-in, with the entry point of our plug-in."""
    from fixtures_model import ROOT

    project = (ROOT / "pyproject.toml").read_text("utf-8")
    point = project.split('[project.entry-points."lmms_eval.models"]\n')[1].split("\n\n")[0]
    about = {
        "stub-1.dist-info/METADATA": "Metadata-Version: 2.1\nName: stub\nVersion: 1\n",
        "stub-1.dist-info/entry_points.txt": "[lmms_eval.models]\n" + point.replace('"', ""),
    }
    return write_files(folder, {**_LMMS, **about})


def write_kit(folder: Path) -> Path:
    """VLMEvalKit's stand-in."""
    return write_files(folder, _KIT)


def importable(folder: Path, package: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Puts a stand-in on the path; afterwards nothing of it is left."""
    found = [name for name in sys.modules if name.split(".")[0] == package]
    for name in found:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        del sys.modules[name]
