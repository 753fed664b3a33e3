//! Ogg Opus (RFC 7845, codec of RFC 6716) to samples at 48 kHz, the rate that Opus works at.
//!
//! symphonia 0.6 has no Opus decoder, and its Ogg reader leaves out damaged pages silently; opus-pure has both, and its
//! reader checks every page. Reference: libopus, which the decoder follows to the rounding of f32 (golden test:
//! `opus_matches_libopus`). Not read: more than two channels.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use opus_pure::{OggOpusReader, OggPacket, OpusDecoder, OpusHead, Repacketizer, packet};

use crate::clip::Audio;
use crate::error::{Error, Result};

/// The rate that granule positions count in, and the one decoded to.
const SAMPLE_RATE_HZ: u32 = 48_000;

/// Samples per channel in the shortest packet there is.
const SHORTEST_PACKET: i64 = 120;

/// Decodes a file: mono or stereo, the header's output gain applied, without the samples that the encoder added at the
/// start (pre-skip) and at the end (those past the last granule position).
///
/// # Errors
/// If the file is damaged, ends early, lacks pages, has more than two channels, or holds several streams.
pub(crate) fn decode(path: &Path, file: File) -> Result<Audio> {
    let unsupported =
        |found: &str| Error::Unsupported { path: path.to_path_buf(), found: format!("Ogg Opus {found}") };
    let mut reader = OggOpusReader::new(BufReader::new(file)).map_err(|e| broken(path, 0, e))?;
    let head = reader.head();
    let (n_channels, pre_skip) = (usize::from(head.channel_count), i64::from(head.pre_skip));
    if !is_plain(head) {
        return Err(unsupported(&format!(
            "with {n_channels} channels in {} streams (channel mapping family {}); mono and stereo are read",
            head.stream_count, head.mapping_family
        )));
    }
    let mut decoder = OpusDecoder::new(SAMPLE_RATE_HZ as i32, n_channels).map_err(|e| broken(path, 0, e))?;
    decoder.gain_q8 = i32::from(head.output_gain_q8);

    let mut channels: Vec<Vec<f32>> = vec![Vec::new(); n_channels];
    let mut pages = Pages::default();
    let (mut packet, mut frames, mut frame) = (OggPacket::default(), Repacketizer::new(), Vec::new());
    let mut decoded: Vec<f32> = Vec::new(); // one frame, interleaved
    loop {
        let n_before = channels[0].len();
        let damaged = |e| broken(path, n_before, e);
        if !reader.read_packet_into(&mut packet).map_err(damaged)? {
            break;
        }
        let n_frame = packet::samples_per_frame(&packet.data, SAMPLE_RATE_HZ as i32).map_err(damaged)?;
        decoded.resize(n_frame * n_channels, 0.0);
        // Frame by frame, since libopus conceals each frame of no or one byte (an encoder's way to say "silence goes
        // on") as if it were lost, also between others in a packet; the decoder does so for a lost packet only.
        frames.clear();
        frames.cat(&packet.data).map_err(damaged)?;
        for i in 0..frames.nb_frames() {
            frame.clear();
            frames.out_range_into(i, i + 1, &mut frame).map_err(damaged)?;
            let coded: &[u8] = if frame.len() <= 2 { &[] } else { &frame }; // one byte names the mode
            let n = decoder.decode(coded, n_frame, &mut decoded).map_err(damaged)?;
            for (channel, samples) in channels.iter_mut().enumerate() {
                samples.extend(decoded[channel..n * n_channels].iter().step_by(n_channels));
            }
        }
        pages.add(&packet, (channels[0].len() - n_before) as i64);
    }
    let mut rest = reader.into_inner();
    if rest.fill_buf().map_err(|e| Error::io(path, "read", e))?.starts_with(b"OggS") {
        return Err(unsupported("with several streams one after another"));
    }

    let n_decoded = channels[0].len() as i64;
    let Some(n_stated) = pages.n_samples() else {
        let detail = "its first page counts fewer samples than it holds".to_string();
        return Err(Error::Damaged { path: path.to_path_buf(), at_s: 0.0, detail });
    };
    // A lost page takes a packet along, of 2.5 ms at least; opusenc 0.1 may count some samples too many at the end.
    if n_decoded + SHORTEST_PACKET <= n_stated {
        return Err(Error::Truncated {
            path: path.to_path_buf(),
            expected: format!("{} samples per channel", n_stated - pre_skip),
            found: (n_decoded - pre_skip).max(0).to_string(),
        });
    }
    let end = n_stated.min(n_decoded);
    let (start, end) = (pre_skip.min(end) as usize, end as usize);
    for samples in &mut channels {
        samples.truncate(end);
        samples.drain(..start);
    }
    Ok(Audio { channels, sample_rate_hz: SAMPLE_RATE_HZ })
}

/// Whether one decoder gives the channels in order: every stream of family 0, mono and stereo of the others.
fn is_plain(head: &OpusHead) -> bool {
    let n_channels = head.channel_count;
    let in_order = head.channel_mapping.iter().copied().eq(0..head.channel_mapping.len() as u8);
    n_channels <= 2 && head.stream_count == 1 && head.coupled_count == n_channels - 1 && in_order
}

/// What the pages say about the length: each states the number of samples up to its end, pre-skip included.
#[derive(Debug, Default)]
struct Pages {
    /// Statement of the first page, and the number of samples in its packets.
    first: Option<(i64, i64)>,
    /// Statement of the last page.
    last: i64,
    /// Whether the first page is the last one, which may count less than it holds.
    only_one: bool,
}

impl Pages {
    fn add(&mut self, packet: &OggPacket, n_samples: i64) {
        self.last = packet.page_granule;
        match &mut self.first {
            None => (self.first, self.only_one) = (Some((self.last, n_samples)), packet.end_of_stream),
            Some((granule, n)) if *granule == self.last => {
                *n += n_samples;
                self.only_one = packet.end_of_stream;
            }
            Some(_) => self.only_one = false,
        }
    }

    /// Number of samples from the start of the first packet to the end of the last, without what the last page cuts off
    /// (RFC 7845, sections 4.3 to 4.5). A stream cut from a longer one starts at another number than 0. `None` if the
    /// first page contradicts itself.
    fn n_samples(&self) -> Option<i64> {
        let (granule, n) = self.first.unwrap_or((0, 0));
        let start = granule.saturating_sub(n);
        match start {
            0.. => Some(self.last.saturating_sub(start).max(0)),
            _ if self.only_one => Some(self.last.max(0)),
            _ => None,
        }
    }
}

fn broken(path: &Path, n_samples: usize, error: opus_pure::Error) -> Error {
    match error {
        opus_pure::Error::Io(e) => Error::io(path, "read", e),
        e => Error::Damaged {
            path: path.to_path_buf(),
            at_s: n_samples as f64 / f64::from(SAMPLE_RATE_HZ),
            detail: e.to_string(),
        },
    }
}
