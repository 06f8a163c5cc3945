"""Reading single files out of large zip archives from many processes."""

import hashlib
import zipfile
import zlib
from pathlib import Path

import numpy as np

from mosaic.files import in_one_line, relative_path, shown

LOCAL_HEADER = 30  # bytes, before name and extra field, whose lengths are its last four


class ZipMembers:
    """The files of a zip archive by name.

    The directory is read once and kept in two arrays, 80 bytes a member, which forked processes share; `zipfile` would take ten times that,
    and each process would read the directory anew. The archive is opened for every reading, so that no process shares a file position.
    """

    def __init__(self, path: Path) -> None:
        """Read the directory.

        Raises:
            ValueError: It is no readable zip archive, holds a name twice, or one that `relative_path` refuses.
        """
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                members = archive.infolist()
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            raise ValueError(f"{path}: cannot be read as a zip archive: {error}.") from error
        for member in members:
            relative_path(member.filename, f"{path}: a member's name", "the archive")
        digests = np.array([_digest(member.filename) for member in members], dtype="S32")
        order = np.argsort(digests)
        self._digests = digests[order]
        twice = np.flatnonzero(self._digests[1:] == self._digests[:-1])
        if len(twice):
            raise ValueError(f"{path}: holds {shown(members[order[twice[0]]].filename)} twice; every name must be there once.")
        numbers = [(m.header_offset, m.compress_size, m.file_size, m.CRC, m.compress_type, m.flag_bits & 1) for m in members]
        self._numbers = np.array(numbers, dtype=np.int64).reshape(-1, 6)[order]

    def __contains__(self, name: str) -> bool:
        return self._find(name) is not None

    def read(self, name: str, max_bytes: int) -> bytes:
        """Unpack one member.

        Args:
            name: Its full name.
            max_bytes: Limit of its unpacked size.

        Raises:
            KeyError: There is no such member.
            ValueError: It is damaged, encrypted, packed by other means than deflate, or too large.
        """
        position = self._find(name)
        if position is None:
            raise KeyError(name)
        place = f"{self.path}[{name}]"
        offset, compress_size, file_size, crc, compress_type, encrypted = self._numbers[position].tolist()
        if file_size > max_bytes:
            raise ValueError(f"{place}: must have at most {max_bytes} bytes, got {file_size}.")
        if encrypted or compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{place}: must be stored or packed by deflate, and not encrypted.")
        member = zipfile.ZipInfo(name)
        member.compress_size, member.file_size, member.CRC, member.compress_type = compress_size, file_size, crc, compress_type
        try:
            with open(self.path, "rb") as file:
                file.seek(offset)
                header = file.read(LOCAL_HEADER)
                if len(header) < LOCAL_HEADER or not header.startswith(b"PK\x03\x04"):
                    raise zipfile.BadZipFile("the directory does not point to a member")
                file.seek(int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little"), 1)
                data = zipfile.ZipExtFile(file, "r", member).read(file_size)  # checks the sum; the size bounds what is unpacked
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError) as error:
            raise ValueError(f"{place}: cannot be read: {in_one_line(error)}.") from error
        if len(data) != file_size:
            raise ValueError(f"{place}: must have {file_size} bytes, got {len(data)}.")
        return data

    def _find(self, name: str) -> int | None:
        digest = np.bytes_(_digest(name))
        position = int(np.searchsorted(self._digests, digest))
        return position if position < len(self._digests) and self._digests[position] == digest else None


def _digest(name: str) -> str:
    return hashlib.blake2b(name.encode(), digest_size=16).hexdigest()
