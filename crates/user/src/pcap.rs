//! A wire made of two files: frames arrive from one, as fast as they are taken, and leave into the other. The format is
//! pcap's (draft-ietf-opsawg-pcap) with Ethernet frames; what is written is stamped with the time in nanoseconds.

use crate::driver::{BATCH, PortDriver};
use crate::pool::{Buffer, Pool};
use pcap_file::pcap::{PcapHeader, PcapPacket, PcapReader, PcapWriter};
use pcap_file::{DataLink, PcapError, TsResolution};
use std::fs::File;
use std::io::Write;
use std::mem::take;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};
use towpath_tables::record::SOCKET_FRAME;

/// A file cannot be read from or written to.
#[derive(thiserror::Error, Debug)]
#[error("cannot use {path} as a wire: {why}")]
pub struct Error {
    path: PathBuf,
    why: String,
}

/// The wire.
pub struct PcapPort {
    input: Option<Input>,
    output: Option<Output>,
}

struct Input {
    path: PathBuf,
    reader: PcapReader<File>,
}

struct Output {
    path: PathBuf,
    file: File,
    /// Length of its header
    header: usize,
    /// Memory for what is written
    pending: Vec<u8>,
    /// It could not be written to, so nothing follows what it holds
    broken: bool,
}

impl PcapPort {
    /// Frames from `input` (none arrive without), and into `output` (they are thrown away without), which is begun anew.
    pub fn open(input: Option<&Path>, output: Option<&Path>) -> Result<Self, Error> {
        Ok(Self { input: input.map(Input::open).transpose()?, output: output.map(Output::open).transpose()? })
    }
}

impl Input {
    fn open(path: &Path) -> Result<Self, Error> {
        let fail = |why: String| Error { path: path.into(), why };
        let file = File::open(path).map_err(|error| fail(error.to_string()))?;
        // A pipe would hold the worker up.
        if !file.metadata().is_ok_and(|metadata| metadata.is_file()) {
            return Err(fail("it is no regular file".into()));
        }
        let reader = PcapReader::new(file).map_err(|error| {
            fail(format!("{} (of another format? editcap -F nsecpcap {} NEW.pcap)", words(&error), path.display()))
        })?;
        match reader.header().datalink {
            DataLink::ETHERNET => Ok(Self { path: path.into(), reader }),
            other => Err(fail(format!("its frames are of link type {other:?}, not Ethernet"))),
        }
    }

    /// Puts the next frame into the buffer; false if there is none. Frames that are not whole are left out.
    fn arrive(&mut self, buffer: &mut Buffer) -> bool {
        loop {
            match self.reader.next_packet() {
                Some(Ok(packet)) => {
                    let whole = packet.orig_len as usize == packet.data.len() && packet.data.len() <= SOCKET_FRAME;
                    let place = buffer.resize(packet.data.len());
                    if whole && place.len() == packet.data.len() {
                        place.copy_from_slice(&packet.data);
                        return true;
                    }
                }
                Some(Err(error)) => {
                    tracing::warn!("nothing more arrives from {}: {}", self.path.display(), words(&error));
                    return false;
                }
                None => return false,
            }
        }
    }
}

impl Output {
    fn open(path: &Path) -> Result<Self, Error> {
        let fail = |why: String| Error { path: path.into(), why };
        let mut file = File::create(path).map_err(|error| fail(error.to_string()))?;
        let header = text(Vec::new()).map_err(|error| fail(words(&error)))?.into_writer();
        file.write_all(&header).map_err(|error| fail(error.to_string()))?;
        Ok(Self { path: path.into(), file, header: header.len(), pending: header, broken: false })
    }

    /// Writes frames at once, all with the time of now.
    fn write(&mut self, frames: &[Buffer]) -> Result<(), PcapError> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.pending.clear();
        let mut writer = text(take(&mut self.pending))?;
        for frame in frames {
            writer.write_packet(&PcapPacket::new(now, frame.bytes().len() as u32, frame.bytes()))?;
        }
        self.pending = writer.into_writer();
        self.file.write_all(self.pending.get(self.header..).unwrap_or_default()).map_err(PcapError::IoError)
    }
}

/// What is to be written, from the file's header on.
fn text(memory: Vec<u8>) -> Result<PcapWriter<Vec<u8>>, PcapError> {
    let (ts_resolution, datalink) = (TsResolution::NanoSecond, DataLink::ETHERNET);
    PcapWriter::with_header(memory, PcapHeader { ts_resolution, datalink, ..PcapHeader::default() })
}

/// The whole of an error.
fn words(error: &PcapError) -> String {
    let causes = std::iter::successors(Some(error as &dyn std::error::Error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

impl PortDriver for PcapPort {
    fn start(&mut self, _pool: &mut Pool) {}

    fn receive(&mut self, pool: &mut Pool, frames: &mut Vec<Buffer>) {
        while frames.len() < BATCH
            && let Some(input) = &mut self.input
            && let Some(mut buffer) = pool.take()
        {
            if input.arrive(&mut buffer) {
                frames.push(buffer);
            } else {
                self.input = None;
                pool.give(buffer);
            }
        }
    }

    fn transmit(&mut self, pool: &mut Pool, frames: &mut Vec<Buffer>) {
        if let Some(output) = &mut self.output {
            if !output.broken
                && let Err(error) = output.write(frames)
            {
                tracing::warn!("nothing more leaves into {}: {}", output.path.display(), words(&error));
                output.broken = true;
            }
            if output.broken {
                return;
            }
        }
        frames.drain(..).for_each(|frame| pool.give(frame));
    }

    /// At the end of the file nothing arrives ever.
    fn readable<'d>(&'d self, _fds: &mut Vec<BorrowedFd<'d>>) -> bool {
        self.input.is_none()
    }

    fn close(self: Box<Self>, _pool: &mut Pool) {}
}
