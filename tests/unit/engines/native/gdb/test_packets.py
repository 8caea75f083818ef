"""Framing of gdb's remote protocol.

Goal: what is sent is what is received, however the bytes are cut; damage is refused.
Method: Hypothesis, and the examples of gdb's manual.
"""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from softsgx.engines.native.gdb.packets import INTERRUPT, Connection, escape, frame, unescape

payloads = st.binary(max_size=60).map(escape)


@given(st.binary())
def test_what_is_escaped_comes_back_and_has_no_byte_that_frames_packets(data: bytes) -> None:
    escaped = escape(data)
    assert unescape(escaped) == data
    assert not set(escaped) & set(b"$#*")


@given(st.lists(st.one_of(payloads, st.none()), max_size=8), st.data())
def test_packets_arrive_however_the_bytes_are_cut(
    wanted: list[bytes | None], data: st.DataObject
) -> None:
    stream = b"".join(b"\x03" if each is None else frame(each) for each in wanted)
    connection, found = Connection(), []
    while stream:
        cut = data.draw(st.integers(1, len(stream)))
        found += connection.receive(stream[:cut])
        stream = stream[cut:]
    assert found == [INTERRUPT if each is None else each for each in wanted]
    assert connection.take_output() == b"+" * sum(each is not None for each in wanted)


@given(payloads, st.data())
def test_a_packet_with_another_checksum_is_refused(payload: bytes, data: st.DataObject) -> None:
    right = sum(payload) & 0xFF
    wrong = data.draw(st.integers(0, 255).filter(lambda value: value != right))
    connection = Connection()
    assert connection.receive(b"$%b#%02x" % (payload, wrong)) == []
    assert connection.take_output() == b"-"


def test_an_answer_that_was_not_understood_is_sent_again() -> None:
    connection = Connection()
    connection.send(b"OK")
    assert connection.take_output() == b"$OK#9a"
    assert connection.receive(b"-") == []
    assert connection.take_output() == b"$OK#9a"


def test_nothing_is_acknowledged_once_gdb_has_asked_for_that() -> None:
    connection = Connection()
    connection.acknowledges = False
    assert connection.receive(b"$g#67$?#00-") == [b"g"]
    assert connection.take_output() == b""
