"""Command lines: options declared in dataclasses, read and checked before torch is imported.

Read `options` (fields with help, the parser, checks), then `command` (the main of a command).
"""
