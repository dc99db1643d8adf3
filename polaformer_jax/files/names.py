"""Names that come from outside (of classes, files, folders) as text that can be printed, stored and drawn."""


def shown(name: str) -> str:
    """The name with everything that cannot be printed escaped, as Python writes it: control characters, separators.

    Bytes of a file name that are no UTF-8, which Python has as surrogates, become `\\xNN`. What is returned can be
    encoded, printed on one line, and written to any file.
    """
    return name if name.isprintable() else "".join(c if c.isprintable() else _escaped(c) for c in name)


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # of `os.fsdecode`
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()
