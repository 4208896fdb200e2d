"""Mappings that differ by what the kernel does with them, each with contents.

Forks all the time: a child must find the contents of its parent, and zeros
where they are to be wiped. Files tell how many children there were (/children)
and how many of them found something else (/wrong).
"""
import ctypes, mmap, os, sys

PAGE = 4096
libc = ctypes.CDLL(None, use_errno=True)


def mapped(name, pages, flags=0, advice=None):
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, pages * PAGE, flags=private | flags)
    if advice is not None:
        memory.madvise(advice)
    for at in range(0, len(memory), PAGE):
        memory[at : at + 8] = b"contents"
    return memory


ordinary = mapped("ordinary", 64)
wiped = mapped("wiped", 4096, advice=18)  # MADV_WIPEONFORK
others = [
    mapped("growing", 64, flags=0x100),  # MAP_GROWSDOWN
    mapped("unreserved", 64, flags=0x4000),  # MAP_NORESERVE
    mapped("not in children", 64, advice=mmap.MADV_DONTFORK),
    mapped("not in core files", 64, advice=mmap.MADV_DONTDUMP),
    mapped("huge", 1024, advice=mmap.MADV_HUGEPAGE),
    mapped("not huge", 64, advice=mmap.MADV_NOHUGEPAGE),
    mapped("in order", 64, advice=mmap.MADV_SEQUENTIAL),
    mapped("anywhere", 64, advice=mmap.MADV_RANDOM),
]
locked = mapped("locked", 64)
address = ctypes.addressof(ctypes.c_ubyte.from_buffer(locked))
assert libc.mlock(ctypes.c_void_p(address), ctypes.c_size_t(len(locked))) == 0


def child():
    for at in range(0, len(wiped), PAGE):
        if wiped[at]:
            return 1
    return any(ordinary[at : at + 8] != b"contents" for at in range(0, len(ordinary), PAGE))


def tell(name, number):
    with open("/." + name, "w") as out:
        out.write(str(number))
    os.rename("/." + name, "/" + name)


children = wrong = 0
while True:
    pid = os.fork()
    if pid == 0:
        os._exit(child())
    wrong += os.waitpid(pid, 0)[1] != 0
    for memory in [ordinary, wiped, locked] + others:
        wrong += any(memory[at : at + 8] != b"contents" for at in range(0, len(memory), PAGE))
    children += 1
    tell("wrong", wrong)
    tell("children", children)
