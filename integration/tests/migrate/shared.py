"""Processes that share memory in three ways and write it all the time.

Each page of each object belongs to one process, which remembers privately what
it wrote last. Asked to (/verify-N), every process checks its own pages and
answers with the number of wrong ones (/answer-N-PROCESS).
"""
import array, ctypes, mmap, os, struct, sys, time

PAGE, PROCESSES = 4096, 3
MIB = int(sys.argv[1])
RATE = int(sys.argv[2])  # pages that each process writes in a second
libc = ctypes.CDLL(None, use_errno=True)
libc.shmat.restype = ctypes.c_void_p
libc.shmat.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int]


def attach(segment, size):
    address = libc.shmat(segment, None, 0)
    assert address != ctypes.c_void_p(-1).value, ctypes.get_errno()
    return memoryview((ctypes.c_ubyte * size).from_address(address)).cast("B")


def segment(key, size):
    found = libc.shmget(key, size, 0o1600)
    assert found >= 0, ctypes.get_errno()
    return found


anonymous = memoryview(mmap.mmap(-1, MIB << 20))
memfd = os.memfd_create("contents")
# The last page is not a whole one, and the end is a hole.
os.ftruncate(memfd, (16 << 20) + 100)
file = memoryview(mmap.mmap(memfd, 12 << 20))
sysv = attach(segment(0x7452, 8 << 20), 8 << 20)
# Nobody has it attached: CRIU saves it.
detached = segment(0x7453, 1 << 20)
libc.shmdt.argtypes = [ctypes.c_void_p]
view = attach(detached, 1 << 20)
view[:8] = b"detached"
address = ctypes.addressof(ctypes.c_ubyte.from_buffer(view))
del view
libc.shmdt(address)

objects = [anonymous, file, sysv]
pages = [(o, at) for o, view in enumerate(objects) for at in range(0, len(view), PAGE)]
# The first page of the anonymous object is for proving that it is shared.
pages = pages[1:]


def content(number, version):
    return struct.pack("<QQ", number * 2654435761, version) * (PAGE // 16)


def write(number, version):
    o, at = pages[number]
    objects[o][at : at + PAGE] = content(number, version)


for number in range(len(pages)):
    write(number, 1)

process = 0
for other in range(1, PROCESSES):
    if os.fork() == 0:
        process = other
        break

own = range(process, len(pages), PROCESSES)
versions = array.array("Q", [1]) * len(own)


def wrong(asked):
    bad = 0
    for index, number in enumerate(own):
        o, at = pages[number]
        bad += objects[o][at : at + PAGE] != content(number, versions[index])
    bad += any(os.pread(memfd, 1 << 20, 14 << 20)) + (os.fstat(memfd).st_size != (16 << 20) + 100)
    back = attach(segment(0x7453, 1 << 20), 1 << 20)
    bad += bytes(back[:8]) != b"detached"
    libc.shmdt(ctypes.addressof(ctypes.c_ubyte.from_buffer(back)))
    # What each says here, all others hear.
    anonymous[process] = asked
    while any(anonymous[other] != asked for other in range(PROCESSES)):
        time.sleep(0.001)
    return bad


open(f"/ready-{process}", "w").close()
asked, at, due = 1, 0, 0.0
last = time.time()
while True:
    time.sleep(0.005)
    now = time.time()
    due, last = due + RATE * min(now - last, 0.05), now
    while due >= 1:
        due, at = due - 1, (at + 7919) % len(own)
        versions[at] += 1
        write(own[at], versions[at])
    if os.path.exists(f"/verify-{asked}"):
        answer = wrong(asked)
        with open(f"/.answer-{process}", "w") as out:
            out.write(str(answer))
        os.rename(f"/.answer-{process}", f"/answer-{asked}-{process}")
        asked += 1
        last = time.time()
