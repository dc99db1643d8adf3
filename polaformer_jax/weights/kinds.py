"""What a file is that was given as weights and is none, told from how it begins."""

FETCH_AGAIN = "fetch it again"
SAVE_AGAIN = "load it in PyTorch and save its state_dict with torch.save"

_OLD_TORCH = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the long integer that the old format of torch.save begins with
_PICKLE_PROTOCOLS = (b"\x02", b"\x03", b"\x04", b"\x05")
_KINDS = {  # how files of other kinds begin: what they are, and how to fix it
    b"PK\x05\x06": ("an empty zip archive", FETCH_AGAIN),
    b"\x1f\x8b": ("compressed with gzip", "unpack it (gunzip)"),
    b"BZh": ("compressed with bzip2", "unpack it (bunzip2)"),
    b"\xfd7zXZ": ("compressed with xz", "unpack it (unxz)"),
    b"\x28\xb5\x2f\xfd": ("compressed with zstd", "unpack it (unzstd)"),
    b"\x89HDF\r\n": ("an HDF5 file", "give the authors' .pth file"),
    b"\x93NUMPY": ("a NumPy array (.npy)", "give the authors' .pth file"),
    b"version https://git-lfs": ("a pointer of Git LFS, not the file itself", "run `git lfs pull`"),
    b"<": ("a web page, perhaps of a failed download", FETCH_AGAIN),
    b"{": ("JSON text, perhaps the error message of a failed download", FETCH_AGAIN),
}
HEAD = 512  # bytes that suffice to tell


def describe(head: bytes) -> tuple[str, str] | None:
    """What a file is, and what to do about it, from its first `HEAD` bytes; None for no kind that is known here."""
    if not head:
        return "empty", FETCH_AGAIN
    if _OLD_TORCH in head[:64]:
        return "in the old format of torch.save (before PyTorch 1.6)", SAVE_AGAIN
    if head[257:262] == b"ustar":
        what = "a tar archive, as the oldest PyTorch wrote them, or with the file inside"
        return what, f"unpack it, or {SAVE_AGAIN}"
    if head[:1] == b"\x80" and head[1:2] in _PICKLE_PROTOCOLS:
        return "a plain pickle, not written by torch.save", SAVE_AGAIN
    if head[8:9] == b"{":
        return "a .safetensors file", "give it that suffix"
    return next((kind for magic, kind in _KINDS.items() if head.lstrip().startswith(magic)), None)
