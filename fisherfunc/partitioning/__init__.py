"""The partition layer: parameter names to block labels. Pure strings and tables; knows no torch."""

from fisherfunc.partitioning.partition import labels_of, partition, rule_name
from fisherfunc.partitioning.rules import (
    OTHER,
    RULES,
    Rule,
    by_head,
    by_layer,
    by_module,
    by_parameter,
    whole,
)

__all__ = [
    "OTHER",
    "RULES",
    "Rule",
    "by_head",
    "by_layer",
    "by_module",
    "by_parameter",
    "labels_of",
    "partition",
    "rule_name",
    "whole",
]
