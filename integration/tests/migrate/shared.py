"""Processes that share memory in three ways and write it all the time.

Each page of each object belongs to one process, which remembers privately what
it wrote last. Asked to (/verify-N), every process checks its own pages and
answers with the number of wrong ones (/answer-N-PROCESS).
"""
import array, ctypes, fcntl, mmap, os, struct, sys, time

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
memfd = os.memfd_create("con tents", os.MFD_ALLOW_SEALING)
os.fchmod(memfd, 0o640)
# The last page is not a whole one, and the end is a hole.
os.ftruncate(memfd, (16 << 20) + 100)
file = memoryview(mmap.mmap(memfd, 12 << 20))
os.lseek(memfd, 4711, os.SEEK_SET)
# The same object in other ways: open twice more, mapped elsewhere, mapped for
# reading alone, and privately with one page that is ours.
own_link = f"/proc/self/fd/{memfd}"
reading = os.open(own_link, os.O_RDONLY)
os.lseek(reading, 12, os.SEEK_SET)
appending = os.open(own_link, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK)
elsewhere = mmap.mmap(memfd, 1 << 20, offset=4 << 20)
only_read = mmap.mmap(reading, 1 << 20, prot=mmap.PROT_READ, offset=8 << 20)
private = mmap.mmap(memfd, 1 << 20, flags=mmap.MAP_PRIVATE, offset=2 << 20)
private[:PAGE] = b"p" * PAGE
# One that nobody may write any more.
SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
sealed = os.memfd_create("sealed", os.MFD_ALLOW_SEALING)
os.write(sealed, b"s" * (1 << 20))
fcntl.fcntl(sealed, fcntl.F_ADD_SEALS, SEALS)
sealed_reading = os.open(f"/proc/self/fd/{sealed}", os.O_RDONLY)
sealed_map = mmap.mmap(sealed_reading, 1 << 20, prot=mmap.PROT_READ)
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


def access(number):
    return fcntl.fcntl(number, fcntl.F_GETFL) & (os.O_ACCMODE | os.O_APPEND | os.O_NONBLOCK)


libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def range_of(offset, rights):
    """The first mapping of the memfd at this offset with these rights."""
    for line in open("/proc/self/maps"):
        fields = line.split(maxsplit=5)
        if "/memfd:con tents" in line and fields[1] == rights and int(fields[2], 16) == offset:
            return [int(address, 16) for address in fields[0].split("-")]
    return None


def is_the_same(view, offset, but=None):
    """Of the pages that nobody else writes meanwhile."""
    found = [pages[number] for number in own]
    there = [at for o, at in found if o == 1 and offset <= at < offset + len(view) and at != but]
    return there and all(view[at - offset : at - offset + PAGE] == file[at : at + PAGE] for at in there)


def surroundings():
    """What is not as it was about the objects, in words."""
    seals = [fcntl.fcntl(number, fcntl.F_GET_SEALS) for number in (memfd, sealed)]
    for_reading = range_of(8 << 20, "r--s")
    checks = {
        "names": os.readlink(own_link) == "/memfd:con tents (deleted)"
        and os.readlink(f"/proc/self/fd/{sealed_reading}") == "/memfd:sealed (deleted)",
        "one inode": os.fstat(memfd).st_ino == os.fstat(appending).st_ino
        and os.fstat(memfd).st_mode & 0o7777 == 0o640,
        "positions": [os.lseek(n, 0, os.SEEK_CUR) for n in (memfd, reading)] == [4711, 12],
        "flags": [access(n) for n in (memfd, reading, appending)]
        == [os.O_RDWR, os.O_RDONLY, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK],
        "seals": seals == [0, SEALS],
        "sealed": sealed_map[:] == b"s" * (1 << 20),
        "elsewhere": is_the_same(elsewhere, 4 << 20),
        "only read": is_the_same(only_read, 8 << 20),
        "stays so": libc.mprotect(for_reading[0], PAGE, 3) == -1,
        "private": private[:PAGE] == b"p" * PAGE and is_the_same(private, 2 << 20, but=2 << 20),
    }
    return [name for name, fine in checks.items() if not fine]


def wrong(asked):
    bad = 0
    for name in surroundings():
        print(f"process {process}, question {asked}: {name}", flush=True)
        bad += 1
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
