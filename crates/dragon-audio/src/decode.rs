//! Files to samples, strictly: damage, truncation and wrong names are errors, never silently less audio.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use symphonia::core::codecs::CodecParameters;
use symphonia::core::codecs::audio::AudioDecoderOptions;
use symphonia::core::codecs::audio::well_known::CODEC_ID_OPUS;
use symphonia::core::errors::Error as DecoderError;
use symphonia::core::formats::probe::Hint;
use symphonia::core::formats::{FormatOptions, TrackType};
use symphonia::core::io::MediaSourceStream;
use symphonia::core::meta::MetadataOptions;

use crate::clip::{self, Audio, Clip};
use crate::error::{Error, Result};
use crate::resample::SAMPLE_RATES_HZ;
use crate::{ogg, opus};

/// Endings of names, in lower case, that count as audio when a folder is read.
pub const ENDINGS: [&str; 12] =
    ["wav", "flac", "ogg", "oga", "opus", "mp3", "mp2", "aif", "aiff", "m4a", "mp4", "caf"];

/// Reads an audio file with all its channels.
///
/// The format is taken from the contents and must agree with the file's extension, if that is a known one. Opus is
/// decoded at 48 kHz, whatever was encoded, and in Ogg only.
///
/// # Errors
/// If the file is missing, empty, mislabelled, in an unsupported format, truncated, damaged,
/// without samples, or carries NaN or infinite samples.
pub fn read(path: &Path) -> Result<Audio> {
    read_as(path, Channels::All)
}

/// Reads an audio file as mono at `sample_rate_hz`: mean of the channels, then resampled.
///
/// # Errors
/// As [`read`], and if the rate lies outside 1 to 768 kHz.
pub fn read_mono(path: &Path, sample_rate_hz: u32) -> Result<Clip> {
    let audio = read_as(path, Channels::Mean)?;
    let mono = match <[Vec<f32>; 1]>::try_from(audio.channels) {
        Ok([samples]) => Clip { samples, sample_rate_hz: audio.sample_rate_hz },
        Err(channels) => Audio { channels, ..audio }.to_mono(),
    };
    if mono.sample_rate_hz == sample_rate_hz { Ok(mono) } else { mono.resample(sample_rate_hz) }
}

/// What is kept of the channels: they are mixed packet by packet, while the samples are near.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Channels {
    All,
    Mean,
}

fn read_as(path: &Path, keep: Channels) -> Result<Audio> {
    let (mut file, kind) = open(path)?;
    file.seek(SeekFrom::Start(0)).map_err(|e| Error::io(path, "read", e))?;
    let audio = match kind {
        Kind::OggOpus => {
            let audio = opus::decode(path, file)?;
            check_finite(path, &audio.channels, 0, audio.sample_rate_hz)?;
            audio
        }
        _ => decode(path, file, kind, keep)?,
    };
    if audio.n_samples() == 0 || audio.sample_rate_hz == 0 {
        return Err(Error::NoSamples { path: path.to_path_buf() });
    }
    if !SAMPLE_RATES_HZ.contains(&audio.sample_rate_hz) {
        return Err(Error::FileRate { path: path.to_path_buf(), found_hz: audio.sample_rate_hz });
    }
    Ok(audio)
}

/// What [`read`] finds without decoding, in well under a millisecond: look at many files with it before the first is
/// worked on.
///
/// # Errors
/// If the file is missing, empty, mislabelled, in a format that cannot be read, or a truncated WAV or Ogg file.
pub fn check(path: &Path) -> Result<()> {
    match open(path)?.1 {
        kind @ (Kind::Text | Kind::Midi) => {
            Err(Error::Unsupported { path: path.to_path_buf(), found: kind.name().to_string() })
        }
        _ => Ok(()),
    }
}

/// Opens a file and looks at its first bytes and, where that is cheap, at its end.
fn open(path: &Path) -> Result<(File, Kind)> {
    let mut file = File::open(path).map_err(|e| Error::io(path, "read", e))?;
    let metadata = file.metadata().map_err(|e| Error::io(path, "read", e))?;
    if metadata.is_dir() {
        return Err(Error::Unsupported { path: path.to_path_buf(), found: "a folder".to_string() });
    }
    let n_bytes = metadata.len();
    if n_bytes == 0 {
        return Err(Error::EmptyFile { path: path.to_path_buf() });
    }
    let mut head = [0u8; 512];
    let n_head = fill(&mut file, &mut head).map_err(|e| Error::io(path, "read", e))?;
    let kind = Kind::of(&head[..n_head]);
    check_name(path, kind)?;
    match kind {
        Kind::OggVorbis | Kind::OggOpus => ogg::check_pages(path, &mut file)?,
        Kind::Wav => check_wav_end(path, &mut file, n_bytes)?,
        _ => {}
    }
    Ok((file, kind))
}

/// The text tags of a file (Vorbis comments, ID3, ...), keys in lower case, in file order.
///
/// # Errors
/// If the file is missing or in an unsupported format.
pub fn read_tags(path: &Path) -> Result<Vec<(String, String)>> {
    let file = File::open(path).map_err(|e| Error::io(path, "read", e))?;
    let stream = MediaSourceStream::new(Box::new(file), Default::default());
    let (format_options, metadata_options) = (FormatOptions::default(), MetadataOptions::default());
    let mut format = symphonia::default::get_probe()
        .probe(&Hint::new(), stream, format_options, metadata_options)
        .map_err(|e| Error::Unsupported { path: path.to_path_buf(), found: e.to_string() })?;
    let mut tags = Vec::new();
    if let Some(revision) = format.metadata().skip_to_latest() {
        let per_track = revision.per_track.iter().flat_map(|t| &t.metadata.tags);
        for tag in revision.media.tags.iter().chain(per_track) {
            tags.push((tag.raw.key.to_lowercase(), tag.raw.value.to_string()));
        }
    }
    Ok(tags)
}

/// Duration of a file in seconds, from its container where that states it (fast), else by decoding.
///
/// # Errors
/// As [`read`] for what can be seen without decoding; damage inside the stream is only found by [`read`].
pub fn read_duration_s(path: &Path) -> Result<f64> {
    let file = File::open(path).map_err(|e| Error::io(path, "read", e))?;
    let stream = MediaSourceStream::new(Box::new(file), Default::default());
    let (format_options, metadata_options) = (FormatOptions::default(), MetadataOptions::default());
    let probed =
        symphonia::default::get_probe().probe(&Hint::new(), stream, format_options, metadata_options);
    let stated = probed.ok().and_then(|format| {
        let track = format.default_track(TrackType::Audio)?;
        let Some(CodecParameters::Audio(params)) = &track.codec_params else { return None };
        // For Opus the container's count includes the samples that the encoder added at the start.
        let n_added = if params.codec == CODEC_ID_OPUS { track.delay.unwrap_or(0) } else { 0 };
        let n_samples = track.num_frames?.saturating_sub(u64::from(n_added));
        Some(n_samples).filter(|&n| n > 0).and_then(|n| Some(n as f64 / f64::from(params.sample_rate?)))
    });
    match stated {
        Some(duration_s) => Ok(duration_s),
        None => Ok(read(path)?.duration_s()),
    }
}

/// Decodes the first audio track.
fn decode(path: &Path, file: File, kind: Kind, keep: Channels) -> Result<Audio> {
    let n_bytes = file.metadata().map_or(0, |metadata| metadata.len());
    let unsupported = |found: String| Error::Unsupported { path: path.to_path_buf(), found };
    let stream = MediaSourceStream::new(Box::new(file), Default::default());
    let mut hint = Hint::new();
    if let Some(extension) = path.extension().and_then(|e| e.to_str()) {
        hint.with_extension(extension);
    }
    let probe = symphonia::default::get_probe();
    let mut format = match probe.probe(&hint, stream, FormatOptions::default(), MetadataOptions::default()) {
        Ok(format) => format,
        Err(DecoderError::Unsupported(_)) => return Err(unsupported(kind.name().to_string())),
        Err(e) => return Err(broken(path, 0.0, &e)),
    };
    let track = format
        .default_track(TrackType::Audio)
        .ok_or_else(|| unsupported(format!("{} without an audio track", kind.name())))?;
    let Some(CodecParameters::Audio(params)) = &track.codec_params else {
        return Err(unsupported(format!("{} with an unknown codec", kind.name())));
    };
    let mut decoder = symphonia::default::get_codecs()
        .make_audio_decoder(params, &AudioDecoderOptions::default())
        .map_err(|e| unsupported(format!("{} with a codec that has no decoder ({e})", kind.name())))?;
    let (track_id, n_expected) = (track.id, track.num_frames);
    let mut sample_rate_hz = params.sample_rate.unwrap_or(0);

    let mut channels: Vec<Vec<f32>> = Vec::new();
    let mut packet_channels: Vec<Vec<f32>> = Vec::new();
    let mut n_channels = 0;
    loop {
        let at_s = channels.first().map_or(0, Vec::len) as f64 / f64::from(sample_rate_hz.max(1));
        let packet = match format.next_packet() {
            Ok(Some(packet)) => packet,
            Ok(None) => break,
            // The end of some containers is only known by running into it; lengths are checked below.
            Err(DecoderError::IoError(e)) if e.kind() == std::io::ErrorKind::UnexpectedEof => break,
            Err(DecoderError::ResetRequired) => {
                return Err(unsupported(format!("{} with several streams one after another", kind.name())));
            }
            Err(e) => return Err(broken(path, at_s, &e)),
        };
        if packet.track_id != track_id {
            continue;
        }
        let buffer = decoder.decode(&packet).map_err(|e| broken(path, at_s, &e))?;
        if buffer.frames() == 0 {
            continue;
        }
        sample_rate_hz = buffer.spec().rate();
        buffer.copy_to_vecs_planar(&mut packet_channels);
        if channels.is_empty() {
            n_channels = packet_channels.len();
            // A header's count may be anything: no more is believed than a well packed file holds.
            let n = n_expected.unwrap_or(0).min(16 * n_bytes) as usize;
            let kept = if keep == Channels::Mean { 1 } else { n_channels };
            channels.resize_with(kept, || Vec::with_capacity(n));
        }
        if packet_channels.len() != n_channels {
            return Err(unsupported(format!("{} whose number of channels changes", kind.name())));
        }
        check_finite(path, &packet_channels, channels[0].len(), sample_rate_hz)?;
        match keep {
            Channels::Mean => clip::add_mean(&packet_channels, &mut channels[0]),
            Channels::All => {
                for (all, new) in channels.iter_mut().zip(&packet_channels) {
                    all.extend_from_slice(new);
                }
            }
        }
    }
    let n_found = channels.first().map_or(0, Vec::len) as u64;
    if let Some(expected) = n_expected.filter(|&n| n > 0 && kind.counts_samples()) {
        // MP3 encoders differ by less than two frames in what they count as padding
        let tolerance = if kind == Kind::Mp3 { 2304 } else { 0 };
        if n_found + tolerance < expected {
            return Err(Error::Truncated {
                path: path.to_path_buf(),
                expected: format!("{expected} samples per channel"),
                found: n_found.to_string(),
            });
        }
    }
    Ok(Audio { channels, sample_rate_hz })
}

fn broken(path: &Path, at_s: f64, error: &DecoderError) -> Error {
    Error::Damaged { path: path.to_path_buf(), at_s, detail: error.to_string() }
}

/// Checks samples that begin at `start` of their file.
fn check_finite(path: &Path, channels: &[Vec<f32>], start: usize, sample_rate_hz: u32) -> Result<()> {
    for (channel, samples) in channels.iter().enumerate() {
        // Without a branch in the loop: this passes over all that is ever read.
        if samples.iter().fold(true, |all, x| all & x.is_finite()) {
            continue;
        }
        if let Some(i) = samples.iter().position(|x| !x.is_finite()) {
            return Err(Error::NonFinite {
                path: path.to_path_buf(),
                channel,
                at_s: (start + i) as f64 / f64::from(sample_rate_hz),
                value: samples[i],
            });
        }
    }
    Ok(())
}

/// File formats told apart by their first bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Wav,
    Flac,
    OggVorbis,
    OggOpus,
    Ogg,
    Mp3,
    Aiff,
    Caf,
    Mp4,
    Matroska,
    Midi,
    Text,
    Other,
}

impl Kind {
    fn of(head: &[u8]) -> Kind {
        let has = |at: usize, bytes: &[u8]| head.get(at..at + bytes.len()) == Some(bytes);
        let contains = |bytes: &[u8]| head.windows(bytes.len()).any(|w| w == bytes);
        if (has(0, b"RIFF") || has(0, b"RF64")) && has(8, b"WAVE") {
            Kind::Wav
        } else if has(0, b"fLaC") {
            Kind::Flac
        } else if has(0, b"OggS") {
            match () {
                () if contains(b"OpusHead") => Kind::OggOpus,
                () if contains(b"\x01vorbis") => Kind::OggVorbis,
                () => Kind::Ogg,
            }
        } else if has(0, b"ID3") || matches!(head, [0xff, b, ..] if b & 0xe6 == 0xe2) {
            Kind::Mp3 // an ID3 tag, or the sync word of layer III
        } else if has(0, b"FORM") && (has(8, b"AIFF") || has(8, b"AIFC")) {
            Kind::Aiff
        } else if has(0, b"caff") {
            Kind::Caf
        } else if has(4, b"ftyp") {
            Kind::Mp4
        } else if has(0, &[0x1a, 0x45, 0xdf, 0xa3]) {
            Kind::Matroska
        } else if has(0, b"MThd") {
            Kind::Midi
        } else if !head.contains(&0) && head.iter().all(|&b| b >= 0x20 || b"\t\r\n\x0c".contains(&b)) {
            Kind::Text
        } else {
            Kind::Other
        }
    }

    fn of_extension(extension: &str) -> Option<Kind> {
        Some(match extension.to_ascii_lowercase().as_str() {
            "wav" | "wave" => Kind::Wav,
            "flac" => Kind::Flac,
            "ogg" | "oga" => Kind::Ogg,
            "opus" => Kind::OggOpus,
            "mp3" => Kind::Mp3,
            "aif" | "aiff" | "aifc" => Kind::Aiff,
            "caf" => Kind::Caf,
            "m4a" | "mp4" => Kind::Mp4,
            "mkv" | "mka" | "webm" => Kind::Matroska,
            _ => return None,
        })
    }

    fn name(self) -> &'static str {
        match self {
            Kind::Wav => "WAV",
            Kind::Flac => "FLAC",
            Kind::OggVorbis => "Ogg Vorbis",
            Kind::OggOpus => "Ogg Opus",
            Kind::Ogg => "Ogg",
            Kind::Mp3 => "MP3",
            Kind::Aiff => "AIFF",
            Kind::Caf => "CAF",
            Kind::Mp4 => "MP4",
            Kind::Matroska => "Matroska",
            Kind::Midi => "MIDI (notes, not audio)",
            Kind::Text => "text",
            Kind::Other => "unknown bytes",
        }
    }

    /// Whether a container's own count of samples can be trusted to detect truncation. (Ogg's end is checked by its
    /// last page: streams cut from longer ones count from another start.)
    fn counts_samples(self) -> bool {
        matches!(self, Kind::Wav | Kind::Flac | Kind::Aiff | Kind::Mp3)
    }
}

fn check_name(path: &Path, found: Kind) -> Result<()> {
    let Some(expected) = path.extension().and_then(|e| e.to_str()).and_then(Kind::of_extension) else {
        return Ok(()); // no known extension: the contents decide
    };
    let agree = match expected {
        Kind::Ogg => matches!(found, Kind::Ogg | Kind::OggVorbis | Kind::OggOpus),
        // MP3 files may begin with padding or free-format frames; the decoder decides about unknown bytes.
        Kind::Mp3 => matches!(found, Kind::Mp3 | Kind::Other),
        _ => found == expected,
    };
    if agree {
        return Ok(());
    }
    Err(Error::Mislabelled {
        path: path.to_path_buf(),
        expected: expected.name().to_string(),
        found: found.name().to_string(),
    })
}

/// The `data` chunk of a whole WAV file fits in the file.
fn check_wav_end(path: &Path, file: &mut File, n_bytes: u64) -> Result<()> {
    let io = |e| Error::io(path, "read", e);
    let mut at = 12u64;
    let mut header = [0u8; 8];
    loop {
        file.seek(SeekFrom::Start(at)).map_err(io)?;
        if fill(file, &mut header).map_err(io)? < 8 {
            return Err(Error::Truncated {
                path: path.to_path_buf(),
                expected: "a `data` chunk".to_string(),
                found: format!("the end of the file after {n_bytes} bytes"),
            });
        }
        let size = u64::from(u32::from_le_bytes([header[4], header[5], header[6], header[7]]));
        if &header[..4] == b"data" {
            // Programs that stream WAV leave the size at 0 or at its largest value.
            let known = size != 0 && size < 0xffff_ff00;
            let found = n_bytes - (at + 8).min(n_bytes);
            if known && found < size {
                return Err(Error::Truncated {
                    path: path.to_path_buf(),
                    expected: format!("{size} bytes of samples"),
                    found: found.to_string(),
                });
            }
            return Ok(());
        }
        at += 8 + size + (size & 1);
    }
}

/// Reads until `buffer` is full or the file ends; returns the number of bytes read.
fn fill(file: &mut File, buffer: &mut [u8]) -> std::io::Result<usize> {
    let mut n = 0;
    while n < buffer.len() {
        match file.read(&mut buffer[n..])? {
            0 => break,
            read => n += read,
        }
    }
    Ok(n)
}
