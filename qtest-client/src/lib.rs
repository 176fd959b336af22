// SPDX-License-Identifier: GPL-2.0-or-later

//! A QEMU process, controlled through the qtest protocol and QMP

pub mod hex;
pub mod mmio;
pub mod pci;
pub mod ring;
pub mod rng;
pub mod transport;

use std::{
    io::{ErrorKind, Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{bail, ensure, Context, Result};
use serde_json::Value;
use tempfile::TempDir;

/// How long QEMU may take to answer.  The limit only catches a QEMU that hangs:
/// it is far longer than an answer takes on a busy host.
pub const TIMEOUT: Duration = Duration::from_secs(60);

struct Lines {
    stream: UnixStream,
    buf: Vec<u8>,
    pos: usize,
    /// There is no end of line between `pos` and this position.
    scanned: usize,
}

impl Lines {
    fn accept(listener: &UnixListener, child: &mut Child) -> Result<Self> {
        let deadline = Instant::now() + TIMEOUT;
        listener.set_nonblocking(true)?;
        loop {
            match listener.accept() {
                Ok((stream, _)) => {
                    stream.set_nonblocking(false)?;
                    stream.set_read_timeout(Some(TIMEOUT))?;
                    stream.set_write_timeout(Some(TIMEOUT))?;
                    return Ok(Self {
                        stream,
                        buf: Vec::new(),
                        pos: 0,
                        scanned: 0,
                    });
                }
                Err(err) if err.kind() == ErrorKind::WouldBlock => {
                    if let Some(status) = child.try_wait()? {
                        bail!("ended during startup: {status}");
                    }
                    ensure!(Instant::now() < deadline, "does not start");
                    sleep(Duration::from_millis(2));
                }
                Err(err) => return Err(err.into()),
            }
        }
    }

    fn buffered_line(&mut self) -> Option<String> {
        let Some(len) = self.buf[self.scanned..].iter().position(|&c| c == b'\n') else {
            self.scanned = self.buf.len();
            return None;
        };
        let end = self.scanned + len;
        let line = String::from_utf8_lossy(&self.buf[self.pos..end])
            .trim_end()
            .to_owned();
        self.pos = end + 1;
        self.scanned = self.pos;
        if self.pos == self.buf.len() {
            self.buf.clear();
            self.pos = 0;
            self.scanned = 0;
        }
        Some(line)
    }

    fn fill(&mut self) -> Result<bool> {
        let mut chunk = [0; 16384];
        match self.stream.read(&mut chunk) {
            Ok(0) => bail!("connection closed"),
            Ok(n) => {
                self.buf.extend_from_slice(&chunk[..n]);
                Ok(true)
            }
            Err(err) if matches!(err.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                Ok(false)
            }
            Err(err) if err.kind() == ErrorKind::Interrupted => Ok(true),
            Err(err) => Err(err.into()),
        }
    }

    fn line(&mut self) -> Result<String> {
        loop {
            if let Some(line) = self.buffered_line() {
                return Ok(line);
            }
            ensure!(self.fill()?, "no answer for too long");
        }
    }

    /// Read what is available, without waiting.
    fn poll(&mut self) -> Result<()> {
        self.stream.set_nonblocking(true)?;
        let mut result = self.fill();
        while matches!(result, Ok(true)) {
            result = self.fill();
        }
        self.stream.set_nonblocking(false)?;
        result.map(drop)
    }
}

/// The qtest command that writes bytes to guest memory, without the newline
pub fn write_command(addr: u64, data: &[u8]) -> String {
    format!("write {addr:#x} {:#x} 0x{}", data.len(), hex::encode(data))
}

/// The value in the answer to a qtest command that reads something
///
/// # Errors
///
/// Fails if the answer has no value.
pub fn value(reply: &str) -> Result<u64> {
    let hex = reply
        .strip_prefix("OK 0x")
        .with_context(|| format!("unexpected reply: {reply}"))?;
    u64::from_str_radix(hex, 16).with_context(|| format!("unexpected reply: {reply}"))
}

/// A QEMU process
pub struct Qemu {
    child: Child,
    qtest: Lines,
    qmp: Lines,
    events: Vec<Value>,
    log: PathBuf,
    dir: TempDir,
}

impl Qemu {
    /// Start `binary` with `args`, and with the arguments that control QEMU.
    pub fn start(binary: &Path, args: &[String]) -> Result<Self> {
        let dir = tempfile::Builder::new()
            .prefix("qtest-client-")
            .tempdir()
            .context("cannot create a directory for sockets")?;
        let log = dir.path().join("log");
        let qtest_path = dir.path().join("qtest");
        let qmp_path = dir.path().join("qmp");
        let qtest_listener = UnixListener::bind(&qtest_path)?;
        let qmp_listener = UnixListener::bind(&qmp_path)?;

        let mut child = Command::new(binary)
            .args(["-nodefaults", "-display", "none", "-accel", "qtest"])
            .args(["-qtest-log", "none", "-qtest"])
            .arg(format!("unix:{}", qtest_path.display()))
            .arg("-qmp")
            .arg(format!("unix:{}", qmp_path.display()))
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(&log)?)
            .spawn()
            .with_context(|| format!("cannot run {}", binary.display()))?;

        let lines = Lines::accept(&qtest_listener, &mut child).and_then(|qtest| {
            let qmp = Lines::accept(&qmp_listener, &mut child)?;
            Ok((qtest, qmp))
        });
        let (qtest, qmp) = match lines {
            Ok(lines) => lines,
            Err(err) => {
                let _ = child.kill();
                let _ = child.wait();
                let log = std::fs::read_to_string(&log).unwrap_or_default();
                return Err(err.context(format!("{}: {log}", binary.display())));
            }
        };
        let mut qemu = Self {
            child,
            qtest,
            qmp,
            events: Vec::new(),
            log,
            dir,
        };
        qemu.qmp.line().context("no QMP greeting")?;
        qemu.qmp(r#"{"execute":"qmp_capabilities"}"#)?;
        Ok(qemu)
    }

    /// Set how long QEMU may take to answer QMP commands.
    ///
    /// # Errors
    ///
    /// Fails if the time is zero.
    pub fn set_qmp_timeout(&mut self, timeout: Duration) -> Result<()> {
        Ok(self.qmp.stream.set_read_timeout(Some(timeout))?)
    }

    /// A directory for files, which is removed when this is dropped
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The last output of QEMU on stderr, and its exit status
    pub fn post_mortem(&mut self) -> String {
        // QEMU may be about to exit
        let deadline = Instant::now() + Duration::from_secs(1);
        let mut status = "still running".to_owned();
        while Instant::now() < deadline {
            if let Ok(Some(code)) = self.child.try_wait() {
                status = format!("ended: {code}");
                break;
            }
            sleep(Duration::from_millis(10));
        }
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<_> = log.lines().collect();
        let tail = lines[lines.len().saturating_sub(5)..].join(" | ");
        format!("{status}; {tail}")
    }

    /// The thread ID of an `iothread`
    ///
    /// # Errors
    ///
    /// Fails if there is no such object.
    pub fn io_thread(&mut self, id: &str) -> Result<u64> {
        let answer = self.qmp(r#"{"execute":"query-iothreads"}"#)?;
        answer["return"]
            .as_array()
            .and_then(|list| list.iter().find(|thread| thread["id"] == id))
            .and_then(|thread| thread["thread-id"].as_u64())
            .with_context(|| format!("no I/O thread {id}: {answer}"))
    }

    /// Wait until a thread sleeps, which means that it has nothing to do: a
    /// thread that was woken up does not count as asleep, even if it has not
    /// run yet.
    ///
    /// # Errors
    ///
    /// Fails if the thread does not go to sleep, or does not exist anymore.
    pub fn wait_asleep(&self, thread: u64) -> Result<()> {
        let path = format!("/proc/{}/task/{thread}/stat", self.child.id());
        let deadline = Instant::now() + TIMEOUT;
        loop {
            let stat = std::fs::read_to_string(&path).with_context(|| path.clone())?;
            // skip the name, which may contain anything
            let state = stat.rsplit(')').next().map(str::trim_start);
            if state.is_some_and(|state| state.starts_with('S')) {
                return Ok(());
            }
            ensure!(
                Instant::now() < deadline,
                "an I/O thread has not slept for {} s",
                TIMEOUT.as_secs()
            );
            sleep(Duration::from_micros(20));
        }
    }

    /// Send qtest commands, each with a newline at its end.
    pub fn send(&mut self, lines: &str) -> Result<()> {
        Ok(self.qtest.stream.write_all(lines.as_bytes())?)
    }

    /// Read the answer to a qtest command.
    pub fn reply(&mut self) -> Result<String> {
        self.qtest.line()
    }

    /// Send a qtest command that reads something, given without the newline,
    /// and return the value.
    pub fn query(&mut self, command: &str) -> Result<u64> {
        self.send(&format!("{command}\n"))?;
        value(&self.reply()?)
    }

    /// Send a QMP command.
    pub fn qmp_send(&mut self, command: &str) -> Result<()> {
        self.qmp.stream.write_all(command.as_bytes())?;
        Ok(self.qmp.stream.write_all(b"\n")?)
    }

    fn qmp_line(&mut self) -> Result<Option<Value>> {
        let line = self.qmp.line()?;
        let mut value: Value =
            serde_json::from_str(&line).with_context(|| format!("bad QMP: {line}"))?;
        if value.get("event").is_some() {
            if let Some(object) = value.as_object_mut() {
                object.remove("timestamp");
            }
            self.events.push(value);
            return Ok(None);
        }
        Ok(Some(value))
    }

    /// Wait for the answer to a QMP command.
    pub fn qmp_reply(&mut self) -> Result<Value> {
        loop {
            if let Some(value) = self.qmp_line()? {
                return Ok(value);
            }
        }
    }

    /// Send a QMP command, and wait for the answer.
    pub fn qmp(&mut self, command: &str) -> Result<Value> {
        self.qmp_send(command)?;
        self.qmp_reply()
    }

    /// Wait for an event.
    pub fn wait_event(&mut self, name: &str) -> Result<()> {
        while !self.events.iter().any(|event| event["event"] == name) {
            ensure!(self.qmp_line()?.is_none(), "unexpected QMP answer");
        }
        Ok(())
    }

    /// The events since the last call
    pub fn take_events(&mut self) -> Result<Vec<Value>> {
        self.qmp.poll()?;
        while self.qmp.buf[self.qmp.pos..].contains(&b'\n') {
            ensure!(self.qmp_line()?.is_none(), "unexpected QMP answer");
        }
        Ok(std::mem::take(&mut self.events))
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
