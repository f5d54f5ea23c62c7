"""Other harnesses that ask our models: lmms-eval and VLMEvalKit. None is needed to import this."""
