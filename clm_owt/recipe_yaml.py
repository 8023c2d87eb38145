"""The YAML of recipes, in which a number is what it is as an option: `010` is ten and `3e-3` a number. YAML 1.1 would
make `010` eight, `1:10` seventy and `3e-3` a text."""

import re
from collections.abc import Hashable
from typing import Any, ClassVar

import yaml

from clm_owt.formatting import format_value

INT, FLOAT, TIMESTAMP = (f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "timestamp"))

DIGITS = r"[0-9]+(?:_[0-9]+)*"
NUMBERS = {
    INT: rf"[-+]?{DIGITS}",
    FLOAT: rf"[-+]?(?:{DIGITS}\.?|(?:{DIGITS})?\.{DIGITS})(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
}


class StrictLoader(yaml.SafeLoader):
    """Reads numbers as above and dates as text. A key given twice is an error, as is a tag that does not fit."""

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in (INT, FLOAT, TIMESTAMP)]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError) as error:  # of `!!int x` and the like
            reason = f"{format_value(node.value)} cannot be read as {node.tag.rpartition(':')[2]}"
            raise yaml.constructor.ConstructorError(None, None, reason, node.start_mark) from error

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            name = self.construct_object(key_node, deep=True)
            if not isinstance(name, Hashable):
                raise yaml.constructor.ConstructorError(None, None, "a key is no plain text", key_node.start_mark)
            if name in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {name!r} is given twice; keep one", key_node.start_mark
                )
            seen.add(name)
        return super().construct_mapping(node, deep)


class RecipeDumper(yaml.SafeDumper):
    """Quotes a text that either this YAML or version 1.1 would read as something else."""


for tag, pattern in NUMBERS.items():
    for either in (StrictLoader, RecipeDumper):
        either.add_implicit_resolver(tag, re.compile(rf"(?:{pattern})\Z"), list("-+.0123456789"))
StrictLoader.add_constructor(INT, lambda loader, node: int(loader.construct_scalar(node)))
