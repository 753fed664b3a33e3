//! Writing WAV files: whole or not at all.

use std::fs::{self, File};
use std::io::{Cursor, Write};
use std::path::{Path, PathBuf};

use crate::clip::{Audio, Clip};
use crate::error::{Error, Result};

/// How samples are stored in a WAV file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SampleFormat {
    /// 16-bit integers: `round(32768 x)`, limited to the range; read back with an error of at most 2^-16.
    Int16,
    /// 32-bit floats: read back exactly.
    Float32,
}

/// Audio that [`write_wav`] can store: [`Audio`] or [`Clip`].
pub trait Channels {
    /// The channels, `[channel][sample]`.
    fn channels(&self) -> Vec<&[f32]>;
    /// Samples per second and channel.
    fn sample_rate_hz(&self) -> u32;
}

impl Channels for Audio {
    fn channels(&self) -> Vec<&[f32]> {
        self.channels.iter().map(Vec::as_slice).collect()
    }
    fn sample_rate_hz(&self) -> u32 {
        self.sample_rate_hz
    }
}

impl Channels for Clip {
    fn channels(&self) -> Vec<&[f32]> {
        vec![&self.samples]
    }
    fn sample_rate_hz(&self) -> u32 {
        self.sample_rate_hz
    }
}

/// Writes a WAV file. The file appears whole or not at all (temporary file beside it, fsync, rename);
/// the folder must exist. The same audio gives the same bytes.
///
/// # Errors
/// If a sample is NaN or infinite (nothing is written), or the system refuses (full disk, missing folder).
pub fn write_wav(path: &Path, audio: &impl Channels, format: SampleFormat) -> Result<()> {
    let bytes = wav_bytes(path, audio, format)?;
    write_atomic(path, &bytes).map_err(|source| Error::io(path, "written", source))
}

/// The bytes of a WAV file; `path` only for messages.
fn wav_bytes(path: &Path, audio: &impl Channels, format: SampleFormat) -> Result<Vec<u8>> {
    let channels = audio.channels();
    let rate = audio.sample_rate_hz();
    for (channel, samples) in channels.iter().enumerate() {
        if let Some(i) = samples.iter().position(|x| !x.is_finite()) {
            return Err(Error::NonFinite {
                path: path.to_path_buf(),
                channel,
                at_s: i as f64 / f64::from(rate),
                value: samples[i],
            });
        }
    }
    let spec = hound::WavSpec {
        channels: channels.len() as u16,
        sample_rate: rate,
        bits_per_sample: if format == SampleFormat::Int16 { 16 } else { 32 },
        sample_format: match format {
            SampleFormat::Int16 => hound::SampleFormat::Int,
            SampleFormat::Float32 => hound::SampleFormat::Float,
        },
    };
    let refused = |e: hound::Error| Error::Io {
        path: path.to_path_buf(),
        action: "written",
        source: std::io::Error::other(e.to_string()),
    };
    let mut bytes = Cursor::new(Vec::new());
    let mut writer = hound::WavWriter::new(&mut bytes, spec).map_err(refused)?;
    for i in 0..channels.first().map_or(0, |c| c.len()) {
        for samples in &channels {
            match format {
                SampleFormat::Int16 => writer.write_sample(to_int16(samples[i])),
                SampleFormat::Float32 => writer.write_sample(samples[i]),
            }
            .map_err(refused)?;
        }
    }
    writer.finalize().map_err(refused)?;
    Ok(bytes.into_inner())
}

/// `round(32768 x)` limited to 16 bits: the inverse of the decoder's division by 32768.
fn to_int16(x: f32) -> i16 {
    (x * 32768.0).round().clamp(-32768.0, 32767.0) as i16
}

/// Writes bytes so that `path` holds them all or is untouched: temporary file in the same folder, fsync, rename.
///
/// # Errors
/// The system's; the temporary file is removed.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let name = path
        .file_name()
        .ok_or_else(|| std::io::Error::new(std::io::ErrorKind::InvalidInput, "the path names no file"))?;
    let mut temporary = name.to_os_string();
    temporary.push(format!(".{}.tmp", std::process::id()));
    let temporary: PathBuf = path.with_file_name(temporary);
    let result = File::create(&temporary).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    });
    if result.is_err() {
        // The first error is the one to report; a leftover temporary file does no harm.
        let _ = fs::remove_file(&temporary);
    }
    result
}
