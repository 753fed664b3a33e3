//! Mel spectrograms as small PNG pictures.

use dragon_audio::{MelConfig, MelNorm, MelScale, MelSpectrogram, PadMode};

/// Decibels between the darkest and the brightest colour.
const RANGE_DB: f32 = 80.0;

/// Control points of the colour map, dark to bright (close to matplotlib's magma).
const COLOURS: [[f32; 3]; 7] = [
    [0.0, 0.0, 4.0],
    [40.0, 17.0, 89.0],
    [114.0, 31.0, 129.0],
    [183.0, 55.0, 121.0],
    [241.0, 96.0, 93.0],
    [254.0, 175.0, 119.0],
    [252.0, 253.0, 191.0],
];

/// The mel spectrogram of `samples` as a PNG file: a column a frame of 16 ms, a row a mel band, low pitch at the bottom.
/// 0 dB is the loudest point. Silence is all dark; a clip shorter than one window gives a one-pixel picture.
pub fn png(samples: &[f32], sample_rate_hz: u32) -> Vec<u8> {
    let hop = (sample_rate_hz as usize * 16).div_ceil(1000).max(1);
    let n_fft = (hop * 4).next_power_of_two();
    if samples.len() < n_fft {
        return encode(1, 1, &[0]);
    }
    let config = MelConfig {
        sample_rate_hz,
        n_fft,
        win_length: n_fft,
        hop,
        n_mels: 96,
        f_min: 0.0,
        f_max: f64::from(sample_rate_hz) / 2.0,
        scale: MelScale::Slaney,
        norm: MelNorm::None,
        power: 2.0,
        center: true,
        pad: PadMode::Constant,
    };
    let spectrogram = MelSpectrogram::new(&config).expect("these settings are valid at any sample rate");
    let mel = spectrogram.compute(samples);
    let loudest = mel.data.iter().copied().fold(0.0f32, f32::max);
    let pixel = |value: f32| {
        let db = 10.0 * (value.max(1e-20) / loudest.max(1e-10)).log10();
        ((1.0 + db / RANGE_DB).clamp(0.0, 1.0) * 255.0) as u8
    };
    let mut pixels = Vec::with_capacity(mel.data.len());
    for band in (0..mel.n_mels).rev() {
        pixels.extend((0..mel.n_frames).map(|frame| pixel(mel.data[frame * mel.n_mels + band])));
    }
    encode(mel.n_frames, mel.n_mels, &pixels)
}

fn encode(width: usize, height: usize, pixels: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, width as u32, height as u32);
    encoder.set_color(png::ColorType::Indexed);
    encoder.set_depth(png::BitDepth::Eight);
    encoder.set_palette(palette());
    let mut writer = encoder.write_header().expect("writing to memory succeeds");
    writer.write_image_data(pixels).expect("as many pixels as the header says");
    writer.finish().expect("writing to memory succeeds");
    bytes
}

/// 256 colours as RGB triples.
fn palette() -> Vec<u8> {
    let steps = COLOURS.len() - 1;
    (0..=255u8)
        .flat_map(|i| {
            let place = f32::from(i) / 255.0 * steps as f32;
            let k = (place as usize).min(steps - 1);
            let part = place - k as f32;
            [0, 1, 2].map(|c| (COLOURS[k][c] + part * (COLOURS[k + 1][c] - COLOURS[k][c])).round() as u8)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(bytes: &[u8]) -> (u32, u32, Vec<u8>) {
        let mut reader = png::Decoder::new(std::io::Cursor::new(bytes)).read_info().unwrap();
        let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
        let info = reader.next_frame(&mut pixels).unwrap();
        (info.width, info.height, pixels)
    }

    #[test]
    fn a_tone_is_one_bright_band() {
        let tone: Vec<f32> =
            (0..32_000).map(|i| (i as f32 * 440.0 / 16_000.0 * std::f32::consts::TAU).sin()).collect();
        let (width, height, pixels) = read(&png(&tone, 16_000));
        assert_eq!(height, 96);
        let column = |x: u32| (0..height).map(move |y| pixels[(y * width + x) as usize]);
        let bright = column(width / 2).filter(|p| *p > 200).count();
        assert!((1..20).contains(&bright), "{bright} bright rows");
    }

    #[test]
    fn silence_and_short_clips_are_dark() {
        assert!(read(&png(&[0.0; 16_000], 16_000)).2.iter().all(|p| *p == 0));
        assert_eq!(read(&png(&[0.1; 10], 16_000)).2, [0]);
    }
}
