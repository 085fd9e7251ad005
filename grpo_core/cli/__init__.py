"""Command lines: options declared by dataclasses, read and checked before torch is loaded.

Read `options`: `Parser` (one-line errors), `option` (a field with its help), `begin`.
"""
