//! What programs do to files that busybox has no tool for.

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread;

const PAGE: usize = 4096;

/// An operation, tried in a directory of its own.
type Operation = fn(&Path) -> io::Result<()>;

const OPERATIONS: &[(&str, Operation)] = &[
    ("hard-links", hard_links),
    ("sparse", sparse),
    ("direct", direct),
    ("mapped", mapped),
    ("rename-over-open", rename_over_open),
    ("unlinked-open", unlinked_open),
    ("xattrs", xattrs),
    ("locks", locks),
    ("times", times),
    ("long-names", long_names),
    ("append", append),
    ("listing", listing),
    ("ring", super::ring::ring),
];

/// Tries every operation below DIR; a line for each, and how it failed.
pub fn files(dir: &str) -> io::Result<()> {
    let mut failed = 0;
    for (name, operation) in OPERATIONS {
        let place = Path::new(dir).join(name);
        fs::create_dir(&place)?;
        let done = operation(&place).and_then(|()| fs::remove_dir_all(&place));
        match done {
            Ok(()) => println!("{name} ok"),
            Err(error) => {
                println!("{name} failed: {error}");
                failed += 1;
            }
        }
    }
    expect(failed == 0, || format!("{failed} failed"))
}

pub fn expect(is_so: bool, otherwise: impl FnOnce() -> String) -> io::Result<()> {
    match is_so {
        true => Ok(()),
        false => Err(io::Error::other(otherwise())),
    }
}

fn check(result: libc::c_int, what: &str) -> io::Result<()> {
    match result {
        0.. => Ok(()),
        _ => {
            let error = io::Error::last_os_error();
            Err(io::Error::new(error.kind(), format!("{what}: {error}")))
        }
    }
}

fn path_of(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_encoded_bytes()).map_err(io::Error::other)
}

fn hard_links(dir: &Path) -> io::Result<()> {
    let (one, two) = (dir.join("one"), dir.join("two"));
    fs::write(&one, "text")?;
    fs::hard_link(&one, &two)?;
    let (a, b) = (fs::metadata(&one)?, fs::metadata(&two)?);
    expect(a.ino() == b.ino() && a.nlink() == 2, || {
        format!("inodes {} {}, {} links", a.ino(), b.ino(), a.nlink())
    })?;
    fs::remove_file(&one)?;
    let links = fs::metadata(&two)?.nlink();
    expect(links == 1 && fs::read(&two)? == b"text", || {
        format!("{links} links after one was removed")
    })
}

fn sparse(dir: &Path) -> io::Result<()> {
    const END: u64 = 64 << 20;
    let file = File::create_new(dir.join("file"))?;
    file.write_all_at(b"end", END)?;
    file.sync_all()?;
    let metadata = file.metadata()?;
    let used = metadata.blocks() * 512;
    expect(metadata.len() == END + 3 && used < END / 2, || {
        format!("{} bytes long, {used} used", metadata.len())
    })?;
    // SAFETY: plain calls on our own descriptor.
    let data = unsafe { libc::lseek(file.as_raw_fd(), 0, libc::SEEK_DATA) };
    expect(data > 0, || format!("the first data is at {data}"))?;
    // SAFETY: as above.
    let result = unsafe { libc::fallocate(file.as_raw_fd(), 0, 0, 1 << 20) };
    check(result, "fallocate")?;
    let used = file.metadata()?.blocks() * 512;
    expect(used >= 1 << 20, || {
        format!("{used} bytes used after fallocate")
    })
}

/// A buffer as O_DIRECT wants it.
#[repr(align(4096))]
struct Aligned([u8; PAGE]);

fn direct(dir: &Path) -> io::Result<()> {
    let path = dir.join("file");
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .custom_flags(libc::O_DIRECT)
        .open(&path)?;
    let written = Box::new(Aligned([0xa5; PAGE]));
    file.write_all_at(&written.0, PAGE as u64)?;
    let mut read = Box::new(Aligned([0; PAGE]));
    file.read_exact_at(&mut read.0, PAGE as u64)?;
    expect(read.0 == written.0, || "reads what was not written".into())?;
    let text = fs::read(&path)?;
    expect(
        text.len() == 2 * PAGE && text[..PAGE] == [0; PAGE] && text[PAGE..] == written.0,
        || format!("{} other bytes through the cache", text.len()),
    )
}

fn mapped(dir: &Path) -> io::Result<()> {
    let path = dir.join("file");
    fs::write(&path, [b'.'; 2 * PAGE])?;
    let file = OpenOptions::new().read(true).write(true).open(&path)?;
    // SAFETY: a new mapping of two pages, unmapped below; nobody truncates the
    // file meanwhile.
    unsafe {
        let at = libc::mmap(
            std::ptr::null_mut(),
            2 * PAGE,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            file.as_raw_fd(),
            0,
        );
        if at == libc::MAP_FAILED {
            return check(-1, "mmap");
        }
        at.cast::<u8>().add(PAGE).write_volatile(b'!');
        check(libc::msync(at, 2 * PAGE, libc::MS_SYNC), "msync")?;
        check(libc::munmap(at, 2 * PAGE), "munmap")?;
    }
    let text = fs::read(&path)?;
    expect(text[PAGE] == b'!' && text[PAGE - 1] == b'.', || {
        "what was stored in memory is not in the file".into()
    })
}

fn rename_over_open(dir: &Path) -> io::Result<()> {
    let (old, new) = (dir.join("old"), dir.join("new"));
    fs::write(&old, "old text")?;
    fs::write(&new, "new text")?;
    let mut open = File::open(&old)?;
    fs::rename(&new, &old)?;
    let mut text = String::new();
    open.read_to_string(&mut text)?;
    let now = fs::read_to_string(&old)?;
    expect(text == "old text" && now == "new text", || {
        format!("open: {text:?}, by name: {now:?}")
    })
}

fn unlinked_open(dir: &Path) -> io::Result<()> {
    let path = dir.join("file");
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)?;
    fs::remove_file(&path)?;
    file.write_all_at(b"still here", 0)?;
    file.set_len(5)?;
    let mut text = [0; 5];
    file.read_exact_at(&mut text, 0)?;
    let links = file.metadata()?.nlink();
    expect(&text == b"still" && links == 0, || {
        format!("{text:?}, {links} links")
    })
}

fn xattrs(dir: &Path) -> io::Result<()> {
    let path = dir.join("file");
    fs::write(&path, "")?;
    let (name, value) = (c"user.probe", b"a value\0 of bytes");
    let file = path_of(&path)?;
    let mut read = [0_u8; 64];
    // SAFETY: the strings end with NUL, and the buffers' sizes are told.
    let (set, length, listed, removed) = unsafe {
        (
            libc::setxattr(
                file.as_ptr(),
                name.as_ptr(),
                value.as_ptr().cast(),
                value.len(),
                0,
            ),
            libc::getxattr(
                file.as_ptr(),
                name.as_ptr(),
                read.as_mut_ptr().cast(),
                read.len(),
            ),
            libc::listxattr(file.as_ptr(), std::ptr::null_mut(), 0),
            libc::removexattr(file.as_ptr(), name.as_ptr()),
        )
    };
    check(set, "setxattr")?;
    check(removed, "removexattr")?;
    expect(
        read.get(..length.max(0) as usize) == Some(value) && listed > 0,
        || format!("{length} bytes read, {listed} listed"),
    )
}

fn locks(dir: &Path) -> io::Result<()> {
    let path = dir.join("file");
    let one = File::create_new(&path)?;
    let two = OpenOptions::new().write(true).open(&path)?;
    one.lock()?;
    expect(
        matches!(two.try_lock(), Err(fs::TryLockError::WouldBlock)),
        || "flock: locked twice".into(),
    )?;
    one.unlock()?;
    two.lock()?;
    two.unlock()?;
    // Of a range, by the open file: it is not ours twice.
    // SAFETY: all zero is a lock of the whole file.
    let mut range: libc::flock = unsafe { std::mem::zeroed() };
    range.l_type = libc::F_WRLCK as libc::c_short;
    // SAFETY: the kernel reads the struct only.
    let (first, second) = unsafe {
        (
            libc::fcntl(one.as_raw_fd(), libc::F_OFD_SETLK, &range),
            libc::fcntl(two.as_raw_fd(), libc::F_OFD_SETLK, &range),
        )
    };
    check(first, "F_OFD_SETLK")?;
    expect(second < 0, || "range locked twice".into())
}

fn times(dir: &Path) -> io::Result<()> {
    let path = dir.join("file");
    let file = File::create_new(&path)?;
    let then = std::time::UNIX_EPOCH + std::time::Duration::new(1_000_000_000, 123_456_789);
    file.set_modified(then)?;
    drop(file);
    let metadata = fs::metadata(&path)?;
    expect(
        (metadata.mtime(), metadata.mtime_nsec()) == (1_000_000_000, 123_456_789),
        || format!("{}.{:09}", metadata.mtime(), metadata.mtime_nsec()),
    )
}

fn long_names(dir: &Path) -> io::Result<()> {
    let name = "\u{e4}".repeat(127);
    fs::write(dir.join(&name), "text")?;
    let text = fs::read(dir.join(&name))?;
    expect(text == b"text", || "another text".into())?;
    let too_long = fs::write(dir.join("x".repeat(256)), "");
    let code = too_long.err().and_then(|error| error.raw_os_error());
    expect(code == Some(libc::ENAMETOOLONG), || {
        format!("a name of 256 bytes: {code:?}")
    })
}

fn append(dir: &Path) -> io::Result<()> {
    let path = dir.join("file");
    let open = || OpenOptions::new().append(true).create(true).open(&path);
    let (mut one, mut two) = (open()?, open()?);
    for _ in 0..50 {
        one.write_all(b"1")?;
        two.write_all(b"2")?;
    }
    let text = fs::read(&path)?;
    expect(text == b"12".repeat(50), || format!("{} bytes", text.len()))
}

/// Entries that go while the directory is read.
fn listing(dir: &Path) -> io::Result<()> {
    for number in 0..500 {
        File::create_new(dir.join(number.to_string()))?;
    }
    let mut seen = 0;
    for entry in fs::read_dir(dir)? {
        fs::remove_file(entry?.path())?;
        seen += 1;
    }
    expect(seen == 500, || format!("{seen} of 500 entries"))
}

/// Makes COUNT small files in DIR, reads them all and removes them.
pub fn many(dir: &str, count: u64) -> io::Result<()> {
    let name = |number: u64| {
        Path::new(dir)
            .join(format!("{:02}", number % 64))
            .join(number.to_string())
    };
    for number in 0..64.min(count) {
        if let Some(parent) = name(number).parent() {
            fs::create_dir(parent)?;
        }
    }
    for number in 0..count {
        fs::write(name(number), format!("number {number}"))?;
    }
    let mut seen = 0;
    for folder in fs::read_dir(dir)? {
        seen += fs::read_dir(folder?.path())?.count() as u64;
    }
    expect(seen == count, || format!("{seen} of {count} are listed"))?;
    for number in 0..count {
        let text = fs::read_to_string(name(number))?;
        expect(text == format!("number {number}"), || {
            format!("{number} reads {text:?}")
        })?;
    }
    for number in 0..count {
        fs::remove_file(name(number))?;
    }
    println!("{count} files");
    Ok(())
}

/// Locks FILE, says so, and holds it until killed.
pub fn hold(file: &str) -> io::Result<()> {
    let file = OpenOptions::new().write(true).open(file)?;
    file.lock()?;
    println!("locked");
    loop {
        thread::park();
    }
}

/// Says whether FILE is locked by somebody else.
pub fn try_lock(file: &str) -> io::Result<()> {
    let file = OpenOptions::new().write(true).open(file)?;
    match file.try_lock() {
        Ok(()) => println!("free"),
        Err(fs::TryLockError::WouldBlock) => println!("held"),
        Err(fs::TryLockError::Error(error)) => return Err(error),
    }
    Ok(())
}

/// Maps FILE, says so, and shows its first byte whenever it changes in memory.
pub fn map(file: &str) -> io::Result<()> {
    let at = map_page(file)?;
    let mut last = None;
    loop {
        // SAFETY: the mapping is ours and as large.
        let now = unsafe { at.read_volatile() };
        if last != Some(now) {
            println!("first byte {}", char::from(now));
            last = Some(now);
        }
        thread::sleep(std::time::Duration::from_millis(20));
    }
}

/// Stores the first byte of TEXT at the start of FILE, through memory.
pub fn poke(file: &str, text: &str) -> io::Result<()> {
    let at = map_page(file)?;
    let byte = text.bytes().next().unwrap_or(b'?');
    // SAFETY: the mapping is ours and as large.
    unsafe { at.write_volatile(byte) };
    Ok(())
}

/// A mapping of the first page of FILE, which stays to the end.
fn map_page(file: &str) -> io::Result<*mut u8> {
    let file = OpenOptions::new().read(true).write(true).open(file)?;
    // SAFETY: a new mapping; the file has a page.
    let at = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            PAGE,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            file.as_raw_fd(),
            0,
        )
    };
    if at == libc::MAP_FAILED {
        check(-1, "mmap")?;
    }
    Ok(at.cast())
}

/// Answers at a unix socket in capitals.
pub fn listen(path: &str) -> io::Result<()> {
    let listener = UnixListener::bind(path)?;
    println!("listening");
    for connection in listener.incoming() {
        let mut connection = connection?;
        let mut text = String::new();
        connection.read_to_string(&mut text)?;
        connection.write_all(text.to_uppercase().as_bytes())?;
    }
    Ok(())
}

/// Asks at a unix socket.
pub fn ask(path: &str, text: &str) -> io::Result<()> {
    let mut connection = UnixStream::connect(path)?;
    connection.write_all(text.as_bytes())?;
    connection.shutdown(std::net::Shutdown::Write)?;
    let mut answer = String::new();
    connection.read_to_string(&mut answer)?;
    println!("{answer}");
    Ok(())
}

/// Tells what is made in DIR or moved there, until it is ended.
pub fn watch(dir: &str) -> io::Result<()> {
    // struct inotify_event has this much before the name.
    const HEADER: usize = 16;
    let path = CString::new(dir)?;
    // SAFETY: no pointers.
    let inotify = unsafe { libc::inotify_init1(libc::IN_CLOEXEC) };
    // SAFETY: the path is a string that ends.
    let watch = unsafe {
        libc::inotify_add_watch(inotify, path.as_ptr(), libc::IN_CREATE | libc::IN_MOVED_TO)
    };
    if inotify < 0 || watch < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: just opened, and nobody else has it.
    let mut events = unsafe { File::from_raw_fd(inotify) };
    println!("watching");
    let mut buffer = [0; 4096];
    loop {
        let count = events.read(&mut buffer)?;
        let mut rest = &buffer[..count];
        while let Some((header, behind)) = rest.split_at_checked(HEADER) {
            let length = [header[12], header[13], header[14], header[15]];
            let length = u32::from_ne_bytes(length) as usize;
            let (name, next) = behind.split_at(length);
            let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
            println!("came {}", String::from_utf8_lossy(name));
            rest = next;
        }
    }
}
