INTERFACE: int
SOURCES: str

def mac_header(eid: int, linaddr: int, flags: int, /) -> bytes: ...
