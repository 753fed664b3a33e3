//! TensorBoard event files: TFRecord framing and the few protobuf fields of a scalar summary, written by hand.
//!
//! A record is `length: u64 LE | masked crc32c(length): u32 LE | data | masked crc32c(data): u32 LE`
//! (reference: tensorflow@v2.16 `core/lib/io/record_writer.cc`); data is one `Event` message
//! (`core/util/event.proto`). CRC32C is the Castagnoli polynomial, which `crc32fast` does not compute.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::error::{Error, Result};

const CRC32C: [u32; 256] = crc32c_table();

const fn crc32c_table() -> [u32; 256] {
    let mut table = [0u32; 256];
    let mut i = 0;
    while i < 256 {
        let mut crc = i as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 == 1 { (crc >> 1) ^ 0x82f6_3b78 } else { crc >> 1 };
            bit += 1;
        }
        table[i] = crc;
        i += 1;
    }
    table
}

/// CRC-32C (Castagnoli), reflected, initial and final value all ones.
pub(crate) fn crc32c(data: &[u8]) -> u32 {
    !data.iter().fold(!0u32, |crc, &byte| (crc >> 8) ^ CRC32C[((crc ^ byte as u32) & 0xff) as usize])
}

/// The rotation and offset that TFRecord applies, so that a checksum of checksums stays useful.
fn masked(crc: u32) -> u32 {
    crc.rotate_right(15).wrapping_add(0xa282_ead8)
}

/// One record of a TFRecord file.
fn record(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    let mut out = Vec::with_capacity(data.len() + 16);
    out.extend_from_slice(&length);
    out.extend_from_slice(&masked(crc32c(&length)).to_le_bytes());
    out.extend_from_slice(data);
    out.extend_from_slice(&masked(crc32c(data)).to_le_bytes());
    out
}

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// A length-delimited field: a string or a nested message.
fn bytes_field(out: &mut Vec<u8>, number: u64, bytes: &[u8]) {
    varint(out, number << 3 | 2);
    varint(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

/// The head of every event: `wall_time` (1, double, seconds) and `step` (2, int64).
fn event(wall_time_s: f64, step: u64) -> Vec<u8> {
    let mut out = vec![1 << 3 | 1];
    out.extend_from_slice(&wall_time_s.to_le_bytes());
    varint(&mut out, 2 << 3);
    varint(&mut out, step);
    out
}

/// Writes one event file, `events.out.tfevents.<seconds>.dragon`.
pub struct Writer {
    file: File,
    path: PathBuf,
}

impl Writer {
    /// Starts a new event file in `dir`. Events that an earlier file of the folder has at `first_step` or later are
    /// dropped by TensorBoard (session start), so a resumed run draws one line.
    ///
    /// # Errors
    /// If the file cannot be created.
    pub fn create(dir: &Path, first_step: usize) -> Result<Self> {
        let mut seconds = now_s() as u64;
        let path = loop {
            let path = dir.join(format!("events.out.tfevents.{seconds:010}.dragon"));
            if !path.exists() {
                break path;
            }
            seconds += 1;
        };
        let file = File::create(&path).map_err(Error::io("create", &path))?;
        let mut writer = Self { file, path };
        let mut version = event(now_s(), 0);
        bytes_field(&mut version, 3, b"brain.Event:2"); // file_version
        writer.write(&version)?;
        let mut start = event(now_s(), first_step as u64);
        bytes_field(&mut start, 7, &[1 << 3, 1]); // session_log { status: START }
        writer.write(&start)?;
        Ok(writer)
    }

    /// Adds the scalars of one step.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn scalars<'a>(
        &mut self,
        step: usize,
        values: impl IntoIterator<Item = (&'a str, f64)>,
    ) -> Result<()> {
        let mut summary = Vec::new();
        for (tag, value) in values {
            let mut item = Vec::new();
            bytes_field(&mut item, 1, tag.as_bytes()); // tag
            item.push(2 << 3 | 5); // simple_value, float
            item.extend_from_slice(&(value as f32).to_le_bytes());
            bytes_field(&mut summary, 1, &item);
        }
        let mut out = event(now_s(), step as u64);
        bytes_field(&mut out, 5, &summary);
        self.write(&out)
    }

    fn write(&mut self, data: &[u8]) -> Result<()> {
        self.file.write_all(&record(data)).map_err(Error::io("write", &self.path))
    }
}

fn now_s() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crc32c_meets_the_published_check_values() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283); // the CRC catalogue's check value
        assert_eq!(crc32c(&[0u8; 32]), 0x8a91_36aa); // RFC 3720, B.4
        assert_eq!(crc32c(&[0xffu8; 32]), 0x62a8_ab43);
    }

    #[test]
    fn a_record_frames_its_data_with_both_checksums() {
        let out = record(b"abc");
        assert_eq!(&out[..8], &3u64.to_le_bytes());
        assert_eq!(u32::from_le_bytes(out[8..12].try_into().unwrap()), masked(crc32c(&3u64.to_le_bytes())));
        assert_eq!(&out[12..15], b"abc");
        assert_eq!(u32::from_le_bytes(out[15..].try_into().unwrap()), masked(crc32c(b"abc")));
    }

    #[test]
    fn a_scalar_event_has_the_bytes_of_the_protobuf_schema() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = Writer::create(dir.path(), 0).unwrap();
        writer.scalars(300, [("loss", 0.5)]).unwrap();
        let bytes = std::fs::read(&writer.path).unwrap();
        // Event { wall_time, step: 300, summary { value { tag: "loss", simple_value: 0.5 } } }
        let mut want = vec![0x10, 0xac, 0x02, 0x2a, 0x0d, 0x0a, 0x0b, 0x0a, 0x04];
        want.extend_from_slice(b"loss");
        want.push(0x15);
        want.extend_from_slice(&0.5f32.to_le_bytes());
        let data = &bytes[bytes.len() - 4 - want.len()..bytes.len() - 4];
        assert_eq!(data, &want[..]);
    }
}
