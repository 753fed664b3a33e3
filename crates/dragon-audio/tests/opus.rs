//! Opus in Ogg: the samples of libopus (`fixtures/dragon-audio/opus`), the exact length, the gain, and what is refused.

use std::fs;
use std::path::Path;

use dragon_audio::{Audio, Error, check, read, read_duration_s};
use dragon_testkit::{Golden, fixture};

/// An Ogg Opus stream taken apart.
#[derive(Clone)]
struct Stream {
    head: Vec<u8>,
    tags: Vec<u8>,
    /// Packets with the number of samples up to their end, one page each.
    packets: Vec<(i64, Vec<u8>)>,
}

impl Stream {
    /// Of a fixture whose packets are all of one duration.
    fn of(name: &str, n_samples_per_packet: i64) -> Stream {
        let bytes = fs::read(fixture("dragon-audio/opus").join(name)).unwrap();
        let (mut packets, mut packet, mut at, mut last) = (Vec::new(), Vec::new(), 0, 0);
        while at < bytes.len() {
            let lacing = &bytes[at + 27..][..usize::from(bytes[at + 26])];
            last = i64::from_le_bytes(bytes[at + 6..at + 14].try_into().unwrap());
            at += 27 + lacing.len();
            for &n in lacing {
                packet.extend_from_slice(&bytes[at..at + usize::from(n)]);
                at += usize::from(n);
                if n < 255 {
                    packets.push(std::mem::take(&mut packet));
                }
            }
        }
        let mut packets = packets.into_iter();
        let (head, tags) = (packets.next().unwrap(), packets.next().unwrap());
        let ends = (1..).map(|i| last.min(i * n_samples_per_packet));
        Stream { head, tags, packets: ends.zip(packets).collect() }
    }

    fn bytes(&self) -> Vec<u8> {
        let mut pages = vec![page(0, 0x02, 0, &self.head), page(1, 0, 0, &self.tags)];
        for (i, (end, packet)) in self.packets.iter().enumerate() {
            let flags = if i + 1 == self.packets.len() { 0x04 } else { 0 };
            pages.push(page(i as u32 + 2, flags, *end, packet));
        }
        pages.concat()
    }

    fn read(&self) -> Result<Audio, Error> {
        read_bytes(&self.bytes())
    }
}

/// A page with one packet (RFC 3533, section 6).
fn page(sequence: u32, flags: u8, granule: i64, packet: &[u8]) -> Vec<u8> {
    let mut page = b"OggS\0".to_vec();
    page.push(flags);
    page.extend(granule.to_le_bytes());
    page.extend(7u32.to_le_bytes());
    page.extend(sequence.to_le_bytes());
    page.extend([0; 4]);
    page.push((packet.len() / 255 + 1) as u8);
    page.extend(std::iter::repeat_n(255, packet.len() / 255));
    page.push((packet.len() % 255) as u8);
    page.extend(packet);
    let crc = page.iter().fold(0u32, |crc, &byte| {
        let shift = |c: u32, _| (c << 1) ^ if c >> 31 == 1 { 0x04c1_1db7 } else { 0 };
        (0..8).fold(crc ^ (u32::from(byte) << 24), shift)
    });
    page[22..26].copy_from_slice(&crc.to_le_bytes());
    page
}

fn read_bytes(bytes: &[u8]) -> Result<Audio, Error> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.opus");
    fs::write(&path, bytes).unwrap();
    read(&path)
}

fn message(bytes: &[u8]) -> String {
    read_bytes(bytes).expect_err("a file that cannot be used").to_string()
}

#[test]
fn opus_matches_libopus() {
    let golden = Golden::fixture("dragon-audio/opus/case.safetensors");
    for (name, n_channels) in [("silk", 1), ("hybrid", 1), ("celt", 2), ("pauses", 1)] {
        let path = fixture("dragon-audio/opus").join(format!("{name}.opus"));
        let audio = read(&path).unwrap();
        assert_eq!((audio.channels.len(), audio.sample_rate_hz), (n_channels, 48000), "{name}");
        let n_samples: Vec<f64> = golden.get(&format!("{name}.n_samples")).to_vec1().unwrap();
        assert_eq!(audio.n_samples() as f64, n_samples[0], "{name}");
        check(&path).unwrap();
        assert_eq!(read_duration_s(&path).unwrap(), audio.duration_s(), "{name}");

        let want: Vec<Vec<f32>> = golden.get(name).to_vec2().unwrap(); // [N / 47, channels]
        assert_eq!(want.len(), audio.n_samples().div_ceil(47), "{name}");
        let mut worst = 0f32;
        for (i, want) in want.iter().enumerate() {
            for (channel, want) in audio.channels.iter().zip(want) {
                worst = worst.max((channel[47 * i] - want).abs());
            }
        }
        // libopus computes in f32 too, in another order; SILK is integer arithmetic
        assert!(worst <= if name == "celt" || name == "hybrid" { 1e-6 } else { 0.0 }, "{name}: {worst:e}");
    }
}

#[test]
fn opus_gives_the_tone_under_either_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = fixture("dragon-audio/formats/tone.opus");
    let audio = read(&path).unwrap();
    assert_eq!((audio.channels.len(), audio.sample_rate_hz, audio.n_samples()), (2, 48000, 4800));
    // away from the start, where the encoder settles: its level, in its channel
    for (channel, level) in audio.channels.iter().zip([0.5, 0.25]) {
        let power = channel[1200..3600].iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / 2400.0;
        assert!(((2.0 * power).sqrt() - level).abs() < 0.02, "{power} {level}");
    }
    let ogg = dir.path().join("tone.ogg");
    fs::copy(&path, &ogg).unwrap();
    assert_eq!(read(&ogg).unwrap(), audio);
    let wav = dir.path().join("tone.wav");
    fs::copy(&path, &wav).unwrap();
    assert!(read(&wav).unwrap_err().to_string().contains("expected WAV, found Ogg Opus"));
}

#[test]
fn the_pages_state_the_exact_length() {
    let whole = Stream::of("hybrid.opus", 960);
    let audio = whole.read().unwrap();
    assert_eq!(audio, read(&fixture("dragon-audio/opus/hybrid.opus")).unwrap());

    let mut shorter = whole.clone();
    shorter.packets.last_mut().unwrap().0 -= 100;
    let got = shorter.read().unwrap();
    assert_eq!(got.channels[0], audio.channels[0][..24002 - 100]);

    let mut too_much = whole.clone(); // as opusenc 0.1 wrote it: 10 more than there are
    too_much.packets.last_mut().unwrap().0 = 26 * 960 + 10;
    assert_eq!(too_much.read().unwrap().n_samples(), 26 * 960 - 312);

    let mut later = whole.clone(); // 123 more samples before the music
    let pre_skip = u16::from_le_bytes([whole.head[10], whole.head[11]]);
    later.head[10..12].copy_from_slice(&(pre_skip + 123).to_le_bytes());
    assert_eq!(later.read().unwrap().channels[0], audio.channels[0][123..]);

    let mut cut_from_longer = whole.clone();
    cut_from_longer.packets.iter_mut().for_each(|(end, _)| *end += 48000);
    assert_eq!(cut_from_longer.read().unwrap(), audio);

    let mut one_packet = whole.clone();
    one_packet.packets = vec![(700, whole.packets[0].1.clone())];
    let n = 700 - usize::from(pre_skip);
    assert_eq!(one_packet.read().unwrap().channels[0], audio.channels[0][..n]);

    let mut nothing = whole.clone();
    nothing.packets = vec![(100, whole.packets[0].1.clone())]; // ends before the music starts
    assert!(matches!(nothing.read(), Err(Error::NoSamples { .. })));
}

#[test]
fn the_output_gain_is_applied() {
    let quiet = Stream::of("celt.opus", 480);
    let mut plain = quiet.clone();
    plain.head[16..18].copy_from_slice(&0i16.to_le_bytes());
    let (quiet, plain) = (quiet.read().unwrap(), plain.read().unwrap());
    let gain = 10f32.powf(-3.5 / 20.0);
    for (quiet, plain) in quiet.channels.iter().flatten().zip(plain.channels.iter().flatten()) {
        assert!((quiet - gain * plain).abs() < 1e-6, "{quiet} {plain}");
    }
}

#[test]
fn only_mono_and_stereo_are_read() {
    let stereo = Stream::of("celt.opus", 480);
    let mut family_1 = stereo.clone();
    family_1.head[18] = 1;
    family_1.head.extend([1, 1, 0, 1]); // streams, coupled streams, the channels in order
    assert_eq!(family_1.read().unwrap(), stereo.read().unwrap());
    let mut surround = stereo.clone();
    surround.head[9] = 6;
    surround.head[18] = 1;
    surround.head.extend([4, 2, 0, 4, 1, 2, 3, 5]);
    let message = message(&surround.bytes());
    assert!(
        message.contains("found Ogg Opus with 6 channels in 4 streams (channel mapping family 1)"),
        "{message}"
    );
}

#[test]
fn damaged_and_missing_pages_are_errors() {
    let whole = Stream::of("hybrid.opus", 960);
    let bytes = whole.bytes();
    for at in (400..bytes.len()).step_by(97) {
        let mut bytes = bytes.clone();
        bytes[at] ^= 0x10;
        assert!(read_bytes(&bytes).is_err(), "byte {at} changed");
    }
    let mut changed = bytes.clone();
    changed[bytes.len() - 10] ^= 1;
    assert!(message(&changed).contains("is damaged at 0.50 s: "), "{}", message(&changed));

    let mut hole = whole.clone();
    hole.packets.remove(10);
    let message_hole = message(&hole.bytes());
    assert!(message_hole.contains("expected 24002 samples per channel, found"), "{message_hole}");

    let mut impossible = whole.clone();
    impossible.packets[0].0 = 900; // its packet has 960
    assert!(message(&impossible.bytes()).contains("its first page counts fewer samples than it holds"));

    let twice = message(&[bytes.clone(), bytes].concat());
    assert!(twice.contains("with several streams one after another"), "{twice}");
}

#[test]
fn broken_headers_never_panic() {
    let whole = Stream::of("celt.opus", 480);
    for at in 8..whole.head.len() {
        for value in [0, 1, 2, 3, 127, 128, 255] {
            let mut stream = whole.clone();
            stream.head[at] = value;
            let _ = stream.read();
        }
    }
    for end in [i64::MIN, -1, 0, 1, i64::MAX] {
        for i in [0, 5, whole.packets.len() - 1] {
            let mut stream = whole.clone();
            stream.packets[i].0 = end;
            if let Ok(audio) = stream.read() {
                assert!(audio.n_samples() <= 24480, "{end} {i}");
            }
        }
    }
    assert!(read(Path::new("/no/such/song.opus")).is_err());
}
