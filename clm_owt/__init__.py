"""Pretrain GPT-2 on OpenWebText: the same run on every machine, nothing wasted, nothing lost."""

__version__ = "0.1.0"
