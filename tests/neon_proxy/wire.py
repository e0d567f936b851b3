"""Messages of PostgreSQL's protocol that a proxy reads or writes.

Source: https://www.postgresql.org/docs/17/protocol-message-formats.html
"""

import asyncio
import struct
from collections.abc import Mapping

SSL_REQUEST = 80877103
GSS_REQUEST = 80877104
CANCEL_REQUEST = 80877102
VERSION_3 = 3 << 16
LONGEST = 1 << 24  # maximum bytes of a valid message


async def read_opening(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """Read the first message of a connection, which has no type. Returns its code and body."""
    length, code = struct.unpack("!II", await reader.readexactly(8))
    return code, await reader.readexactly(checked(length) - 8)


async def read_message(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """Read any later message. Returns its type and body."""
    kind, length = struct.unpack("!cI", await reader.readexactly(5))
    return kind, await reader.readexactly(checked(length) - 4)


def checked(length: int) -> int:
    if not 4 <= length <= LONGEST:
        raise ValueError(f"a message of {length} bytes")
    return length


def opening(code: int, body: bytes) -> bytes:
    return struct.pack("!II", len(body) + 8, code) + body


def message(kind: bytes, body: bytes = b"") -> bytes:
    return kind + struct.pack("!I", len(body) + 4) + body


def read_parameters(body: bytes) -> dict[str, str]:
    """Parse the startup parameters: user, database, options, …"""
    words = [word.decode() for word in body.rstrip(b"\0").split(b"\0")]
    return dict(zip(words[::2], words[1::2], strict=False))


def startup(parameters: Mapping[str, str]) -> bytes:
    words = [f"{name}\0{value}\0" for name, value in parameters.items()]
    return opening(VERSION_3, "".join(words).encode() + b"\0")


def authentication(code: int, body: bytes = b"") -> bytes:
    return message(b"R", struct.pack("!I", code) + body)


AUTHENTICATION_OK = authentication(0)
ASK_FOR_PASSWORD = authentication(3)


def ask_for_sasl(*mechanisms: bytes) -> bytes:
    return authentication(10, b"".join(name + b"\0" for name in mechanisms) + b"\0")


def read_sasl_choice(body: bytes) -> tuple[str, str]:
    """Return the mechanism that the client chose, and its first message."""
    mechanism, _, rest = body.partition(b"\0")
    return mechanism.decode(), rest[4:].decode()


def error(text: str, severity: str = "ERROR", code: str = "XX000") -> bytes:
    """Encode an error like Neon's proxy: without the field V, which servers send since 9.6."""
    fields = (f"S{severity}", f"C{code}", f"M{text}")
    return message(b"E", "".join(f"{field}\0" for field in fields).encode() + b"\0")


def statement_of(kind: bytes, body: bytes) -> str | None:
    """Return the SQL of a Query or Parse message, or None for any other."""
    if kind == b"Q":
        return body.partition(b"\0")[0].decode(errors="replace")
    if kind == b"P":
        return body.split(b"\0")[1].decode(errors="replace")
    return None
