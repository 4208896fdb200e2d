"""Files of every kind in tmpfs mounts, some of them in use.

Asked to (/verify-N) it looks at all of them and answers with what is wrong
(/answer-N, empty if nothing is).
"""
import ctypes, mmap, os, select, socket, stat, struct, sys, time

BIG = int(sys.argv[1]) << 20
ROOTS = ["/dev/shm", "/scratch", "/kept"]
socket.setdefaulttimeout(5)
libc = ctypes.CDLL(None, use_errno=True)


def big(number):
    """A piece of a MiB that is like no other."""
    return struct.pack("<I", number + 1) * (1 << 18)


class Tree:
    def __init__(self, root):
        self.root = root
        at = self.at
        os.makedirs(at("d/e"))
        with open(at("d/e/file"), "w") as file:
            file.write("inside")
        os.link(at("d/e/file"), at("d/linked"))
        os.symlink("d/e/file", at("symlink"))
        os.mkfifo(at("fifo"), 0o620)
        os.mknod(at("null"), 0o640 | stat.S_IFCHR, os.makedev(1, 3))
        with open(at("owned"), "w") as file:
            file.write("by somebody")
        os.chown(at("owned"), 1234, 5678)
        os.chmod(at("owned"), 0o4751)
        os.utime(at("owned"), ns=(10**18, 10**18 + 123456789))
        os.setxattr(at("owned"), "user.note", b"kept")
        with open(at("sparse"), "wb") as file:
            file.seek((8 << 20) - 5)
            file.write(b"tail")
            file.truncate(16 << 20)

        # In use, and by no name any more.
        self.open = open(at("open"), "w+b", buffering=0)
        self.open.write(b"0123456789")
        self.open.seek(4)
        self.deleted = open(at("deleted"), "w+b", buffering=0)
        self.deleted.write(b"deleted")
        os.unlink(at("deleted"))
        self.renamed = open(at("first"), "w+b", buffering=0)
        self.renamed.write(b"two names")
        os.link(at("first"), at("second"))
        os.unlink(at("first"))
        mapped = os.open(at("mapped"), os.O_RDWR | os.O_CREAT)
        os.ftruncate(mapped, 1 << 20)
        self.mapped = mmap.mmap(mapped, 1 << 20)
        self.mapped[777777] = 77
        os.mkfifo(at("talking"))
        # CRIU tells fifos apart by their inode numbers alone, and each tmpfs
        # counts its own: one in use is as many as can be.
        if root == "/scratch":
            self.talking = os.open(at("talking"), os.O_RDWR | os.O_NONBLOCK)
            os.write(self.talking, b"unread")
        os.mkdir(at("sockets"))
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(at("sockets/listener"))
        os.chmod(at("sockets/listener"), 0o600)
        self.listener.listen()
        stale = socket.socket(socket.AF_UNIX)
        stale.bind(at("sockets/stale"))
        stale.close()
        os.mkdir(at("watched"))
        self.watch = libc.inotify_init1(os.O_NONBLOCK)
        libc.inotify_add_watch(self.watch, at("watched").encode(), 0x100)  # IN_CREATE

    def at(self, name):
        return f"{self.root}/{name}"

    def expect(self):
        at = self.at
        yield "file", open(at("d/linked")).read() == "inside"
        yield "hard link", os.stat(at("d/linked")).st_ino == os.stat(at("d/e/file")).st_ino
        yield "symlink", os.readlink(at("symlink")) == "d/e/file"
        yield "fifo", stat.S_ISFIFO(os.stat(at("fifo")).st_mode)
        yield "device", os.stat(at("null")).st_rdev == os.makedev(1, 3)
        owned = os.stat(at("owned"))
        yield "owner", (owned.st_uid, owned.st_gid) == (1234, 5678)
        yield "mode", stat.S_IMODE(owned.st_mode) == 0o4751
        # CRIU's own tar keeps neither.
        if self.root != "/kept":
            yield "time", owned.st_mtime_ns == 10**18 + 123456789
            yield "attribute", os.getxattr(at("owned"), "user.note") == b"kept"
        with open(at("sparse"), "rb") as file:
            whole = file.read()
            yield "sparse", len(whole) == 16 << 20 and whole.strip(b"\0") == b"tail"
        yield "holes", os.stat(at("sparse")).st_blocks * 512 < 1 << 20
        yield "offset", self.open.tell() == 4 and os.pread(self.open.fileno(), 20, 0)[:10] == b"0123456789"
        os.pwrite(self.open.fileno(), b"x", 10)
        yield "same file", open(at("open"), "rb").read() == b"0123456789x"
        yield "deleted", os.pread(self.deleted.fileno(), 20, 0) == b"deleted"
        yield "deleted has no name", os.fstat(self.deleted.fileno()).st_nlink == 0
        yield "other name", os.fstat(self.renamed.fileno()).st_ino == os.stat(at("second")).st_ino
        yield "no more names", os.fstat(self.renamed.fileno()).st_nlink == 1
        yield "mapped", self.mapped[777777] == 77
        self.mapped[5] = (self.mapped[5] + 1) % 256
        yield "still mapped", open(at("mapped"), "rb").read(6)[5] == self.mapped[5]
        if self.root == "/scratch":
            yield "unread", os.read(self.talking, 20) == b"unread"
            os.write(self.talking, b"unread")
        client = socket.socket(socket.AF_UNIX)
        client.connect(at("sockets/listener"))
        server, _ = self.listener.accept()
        client.send(b"hello")
        yield "socket", server.recv(5) == b"hello"
        yield "socket's mode", stat.S_IMODE(os.stat(at("sockets/listener")).st_mode) == 0o600
        name = at(f"watched/{time.monotonic_ns()}")
        open(name, "w").close()
        yield "watch", select.select([self.watch], [], [], 5)[0] and os.read(self.watch, 4096)
        left = set(os.listdir(self.root)) - {"big"}
        yield f"names {sorted(left)}", left == {
            "d", "symlink", "fifo", "null", "owned", "sparse", "open", "second", "mapped",
            "talking", "sockets", "watched",
        }


def wrong():
    for tree in trees:
        for what, right in tree.expect():
            if not right:
                yield f"{tree.root}: {what}"
    if BIG:
        with open("/scratch/big", "rb") as file:
            for number in range(BIG >> 20):
                if file.read(1 << 20) != big(number):
                    yield f"the big file at {number} MiB"
        os.mkdir("/scratch/after")
        os.rmdir("/scratch/after")
    if os.stat("/dev/mine").st_rdev != os.makedev(1, 5):
        yield "/dev/mine"
    try:
        open("/readonly/file", "w")
        yield "/readonly can be written"
    except OSError as error:
        if error.errno != 30:
            yield f"/readonly: {error}"


trees = [Tree(root) for root in ROOTS]
os.mknod("/dev/mine", 0o666 | stat.S_IFCHR, os.makedev(1, 5))
if BIG:
    with open("/scratch/big", "wb") as file:
        for number in range(BIG >> 20):
            file.write(big(number))
open("/ready", "w").close()
number = 1
while True:
    if os.path.exists(f"/verify-{number}"):
        try:
            answer = "\n".join(wrong())
        except Exception as error:
            answer = f"{type(error).__name__}: {error}"
        with open("/answer.new", "w") as file:
            file.write(answer)
        os.rename("/answer.new", f"/answer-{number}")
        number += 1
    time.sleep(0.01)
