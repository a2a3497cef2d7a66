r"""SMPP 3.4 on the wire: the few PDUs that sending needs, from values to bytes and back.

Both sides use it: the provider (`channels.smpp`) and its simulator. Section numbers are of the SMPP Protocol Specification
v3.4, issue 1.2. All numbers are big-endian; a C-octet string ends with \0; a TLV is tag, length and value.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final, NamedTuple

MAX_PDU_BYTES: Final = 70_000  # a message_payload of 64 KiB and what surrounds it; more is no SMPP
VERSION: Final = 0x34
_HEADER: Final = struct.Struct(">4I")
_TLV: Final = struct.Struct(">2H")
HEADER_BYTES: Final = _HEADER.size
_MAX_SEQUENCE: Final = 0x7FFFFFFF


class Command(IntEnum):
    """Section 5.1.2.1. A response has the highest bit set."""

    GENERIC_NACK = 0x80000000
    BIND_RECEIVER = 0x00000001
    BIND_RECEIVER_RESP = 0x80000001
    BIND_TRANSMITTER = 0x00000002
    BIND_TRANSMITTER_RESP = 0x80000002
    SUBMIT_SM = 0x00000004
    SUBMIT_SM_RESP = 0x80000004
    DELIVER_SM = 0x00000005
    DELIVER_SM_RESP = 0x80000005
    UNBIND = 0x00000006
    UNBIND_RESP = 0x80000006
    BIND_TRANSCEIVER = 0x00000009
    BIND_TRANSCEIVER_RESP = 0x80000009
    ENQUIRE_LINK = 0x00000015
    ENQUIRE_LINK_RESP = 0x80000015
    ALERT_NOTIFICATION = 0x00000102


RESPONSE: Final = 0x80000000


class Status(IntEnum):
    """Section 5.1.3: those with a meaning of their own here. The carrier's own begin at 0x400."""

    ESME_ROK = 0x00
    ESME_RINVMSGLEN = 0x01
    ESME_RINVCMDLEN = 0x02
    ESME_RINVCMDID = 0x03
    ESME_RINVBNDSTS = 0x04
    ESME_RALYBND = 0x05
    ESME_RINVPRTFLG = 0x06
    ESME_RINVREGDLVFLG = 0x07
    ESME_RSYSERR = 0x08
    ESME_RINVSRCADR = 0x0A
    ESME_RINVDSTADR = 0x0B
    ESME_RINVMSGID = 0x0C
    ESME_RBINDFAIL = 0x0D
    ESME_RINVPASWD = 0x0E
    ESME_RINVSYSID = 0x0F
    ESME_RMSGQFUL = 0x14
    ESME_RINVSERTYP = 0x15
    ESME_RINVESMCLASS = 0x43
    ESME_RSUBMITFAIL = 0x45
    ESME_RINVSRCTON = 0x48
    ESME_RINVSRCNPI = 0x49
    ESME_RINVDSTTON = 0x50
    ESME_RINVDSTNPI = 0x51
    ESME_RINVSYSTYP = 0x53
    ESME_RINVREPFLAG = 0x54
    ESME_RTHROTTLED = 0x58
    ESME_RINVSCHED = 0x61
    ESME_RINVEXPIRY = 0x62
    ESME_RINVDFTMSGID = 0x63
    ESME_RX_T_APPN = 0x64
    ESME_RX_P_APPN = 0x65
    ESME_RX_R_APPN = 0x66
    ESME_RINVOPTPARSTREAM = 0xC0
    ESME_ROPTPARNOTALLWD = 0xC1
    ESME_RINVPARLEN = 0xC2
    ESME_RMISSINGOPTPARAM = 0xC3
    ESME_RINVOPTPARAMVAL = 0xC4
    ESME_RDELIVERYFAILURE = 0xFE
    ESME_RUNKNOWNERR = 0xFF


class Tag(IntEnum):
    """Section 5.3.2."""

    RECEIPTED_MESSAGE_ID = 0x001E
    USER_MESSAGE_REFERENCE = 0x0204
    SC_INTERFACE_VERSION = 0x0210
    NETWORK_ERROR_CODE = 0x0423
    MESSAGE_PAYLOAD = 0x0424
    MESSAGE_STATE = 0x0427


class Coding(IntEnum):
    """data_coding, section 5.2.19."""

    DEFAULT = 0x00  # the carrier's: the GSM alphabet, one septet a byte
    IA5 = 0x01
    LATIN1 = 0x03
    UCS2 = 0x08


class EsmClass(IntEnum):
    """Flags of esm_class, section 5.2.12."""

    RECEIPT = 0x04  # of bits 5 to 2, all of which tell what a message is
    INTERMEDIATE = 0x20
    USER_DATA_HEADER = 0x40


MESSAGE_TYPE: Final = 0x3C


class MessageState(IntEnum):
    """Section 5.2.28."""

    ENROUTE = 1
    DELIVERED = 2
    EXPIRED = 3
    DELETED = 4
    UNDELIVERABLE = 5
    ACCEPTED = 6
    UNKNOWN = 7
    REJECTED = 8


class WireError(ValueError):
    """Bytes that are no SMPP. Nothing on the connection can be relied on any more."""


class Pdu(NamedTuple):
    """A PDU whose body is not looked into yet."""

    command: int
    status: int
    sequence: int
    body: bytes = b""

    def encode(self) -> bytes:
        """Return its bytes."""
        return _HEADER.pack(HEADER_BYTES + len(self.body), self.command, self.status, self.sequence) + self.body


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """An address with its type of number and numbering plan (sections 5.2.5 and 5.2.6)."""

    ton: int = 0
    npi: int = 0
    digits: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Short:
    """The body of submit_sm and deliver_sm, which is one (sections 4.4.1 and 4.6.1)."""

    service_type: str = ""
    source: Address
    destination: Address
    esm_class: int = 0
    validity_period: str = ""
    registered_delivery: int = 0
    data_coding: int = Coding.DEFAULT
    message: bytes = field(default=b"", repr=False)
    tlvs: Mapping[int, bytes] = field(default_factory=dict, repr=False)

    @property
    def whole_message(self) -> bytes:
        """The message, wherever it stands."""
        return self.message or self.tlvs.get(Tag.MESSAGE_PAYLOAD, b"")

    def encode(self) -> bytes:
        """Return the body's bytes. Raises ValueError when a field does not fit."""
        if len(self.message) > 254:
            raise ValueError("a short message has 254 bytes at most")
        return b"".join(
            (
                c_octets(self.service_type, 6),
                _address(self.source),
                _address(self.destination),
                bytes((self.esm_class, 0, 0)),  # protocol_id, priority_flag
                b"\0",  # schedule_delivery_time: at once
                c_octets(self.validity_period, 17),
                bytes((self.registered_delivery, 0, self.data_coding, 0, len(self.message))),
                self.message,
                *(_TLV.pack(tag, len(value)) + value for tag, value in self.tlvs.items()),
            )
        )

    @classmethod
    def decode(cls, body: bytes) -> Short:
        """Return what `body` says. Raises WireError."""
        reader = Reader(body)
        service_type = reader.text(6)
        source = reader.address()
        destination = reader.address()
        esm_class, _protocol_id, _priority = reader.take(3)
        reader.text(17)
        validity_period = reader.text(17)
        registered_delivery, _replace, data_coding, _default, length = reader.take(5)
        return cls(
            service_type=service_type,
            source=source,
            destination=destination,
            esm_class=esm_class,
            validity_period=validity_period,
            registered_delivery=registered_delivery,
            data_coding=data_coding,
            message=reader.take(length),
            tlvs=reader.tlvs(),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Bind:
    """The body of each bind (section 4.1)."""

    system_id: str
    password: str = field(repr=False)
    system_type: str = ""
    version: int = VERSION

    def encode(self) -> bytes:
        """Return the body's bytes. Raises ValueError when a field does not fit."""
        head = c_octets(self.system_id, 16) + c_octets(self.password, 65) + c_octets(self.system_type, 13)
        return head + bytes((self.version, 0, 0, 0))  # addr_ton, addr_npi, and no address_range

    @classmethod
    def decode(cls, body: bytes) -> Bind:
        """Return what `body` says. Raises WireError."""
        reader = Reader(body)
        found = cls(system_id=reader.text(16), password=reader.text(65), system_type=reader.text(13), version=reader.take(1)[0])
        reader.take(2)
        reader.text(41)
        return found


class Reader:
    """Reads a body from its start. Each method raises WireError where the bytes end too early."""

    def __init__(self, body: bytes) -> None:
        self._body = body
        self._at = 0

    def take(self, count: int) -> bytes:
        """Return the next `count` bytes."""
        end = self._at + count
        if end > len(self._body):
            raise WireError("a PDU ends within a field")
        found = self._body[self._at : end]
        self._at = end
        return found

    def address(self) -> Address:
        """Return the next address."""
        ton, npi = self.take(2)
        return Address(ton=ton, npi=npi, digits=self.text(21))

    def text(self, most: int) -> str:
        """Return the next C-octet string, of at most `most` bytes with its end."""
        end = self._body.find(b"\0", self._at, self._at + most)
        if end < 0:
            raise WireError("a string does not end")
        found = self._body[self._at : end]
        self._at = end + 1
        return found.decode("latin-1")

    def tlvs(self) -> dict[int, bytes]:
        """Return what is left, as TLVs by their tag."""
        found: dict[int, bytes] = {}
        while self._at < len(self._body):
            tag, length = _TLV.unpack(self.take(_TLV.size))
            found[tag] = self.take(length)
        return found


def c_octets(text: str, most: int) -> bytes:
    """Return `text` as a C-octet string of at most `most` bytes, its end among them. Raises ValueError."""
    encoded = text.encode("latin-1")
    if len(encoded) >= most or b"\0" in encoded:
        raise ValueError(f"a string is longer than {most - 1} bytes")
    return encoded + b"\0"


def split(buffer: bytearray) -> list[Pdu]:
    """Take the whole PDUs off the front of `buffer`. Raises WireError when what follows is none."""
    found: list[Pdu] = []
    at = 0
    while len(buffer) - at >= HEADER_BYTES:
        length, command, status, sequence = _HEADER.unpack_from(buffer, at)
        if not HEADER_BYTES <= length <= MAX_PDU_BYTES:
            raise WireError("a PDU has an impossible length")
        if len(buffer) - at < length:
            break
        found.append(Pdu(command, status, sequence, bytes(buffer[at + HEADER_BYTES : at + length])))
        at += length
    del buffer[:at]
    return found


def following(sequence: int) -> int:
    """Return the sequence number after `sequence` (section 3.2: from 1 to 0x7FFFFFFF)."""
    return sequence % _MAX_SEQUENCE + 1


def name_of(status: int) -> str:
    """Return how a command_status is called, such as ESME_RTHROTTLED; a carrier's own by its number."""
    try:
        return Status(status).name
    except ValueError:
        return f"0x{status:08x}"


def joined(reference: int, parts: list[bytes]) -> list[bytes]:
    """Return `parts` each after the header that joins them (3GPP TS 23.040 section 9.2.3.24.1). `reference`: 8 bits."""
    return [bytes((5, 0, 3, reference, len(parts), number)) + part for number, part in enumerate(parts, 1)]


def _address(address: Address) -> bytes:
    return bytes((address.ton, address.npi)) + c_octets(address.digits, 21)
