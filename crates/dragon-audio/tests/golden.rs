//! Spectra and loudness against librosa and pyloudnorm (`fixtures/dragon-audio/mel`).

use dragon_audio::{
    MelConfig, MelNorm, MelScale, MelSpectrogram, PadMode, lufs, mel_filterbank, spectral_centroid_hz,
    stft_magnitude,
};
use dragon_testkit::{Golden, Tol, assert_slices_close};

fn golden() -> Golden {
    Golden::fixture("dragon-audio/mel/case.safetensors")
}

fn values(golden: &Golden, name: &str) -> Vec<f64> {
    let tensor = golden.get(name).to_dtype(candle_core::DType::F64).unwrap();
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

fn audio(golden: &Golden) -> Vec<f32> {
    golden.get("audio").to_vec1().unwrap()
}

fn cases() -> [(&'static str, MelConfig); 3] {
    let slaney = MelConfig {
        sample_rate_hz: 16000,
        n_fft: 1024,
        win_length: 1024,
        hop: 256,
        n_mels: 64,
        f_min: 0.0,
        f_max: 8000.0,
        scale: MelScale::Slaney,
        norm: MelNorm::Slaney,
        power: 2.0,
        center: true,
        pad: PadMode::Constant,
    };
    let htk = MelConfig {
        n_fft: 512,
        win_length: 400,
        hop: 160,
        n_mels: 40,
        f_min: 20.0,
        f_max: 7600.0,
        scale: MelScale::Htk,
        norm: MelNorm::None,
        power: 1.0,
        pad: PadMode::Reflect,
        ..slaney.clone()
    };
    let start = MelConfig { n_fft: 512, win_length: 512, n_mels: 96, center: false, ..slaney.clone() };
    [("slaney", slaney), ("htk", htk), ("start", start)]
}

fn f64s(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&v| f64::from(v)).collect()
}

#[test]
fn mel_spectrograms_match_librosa() {
    let golden = golden();
    for (name, config) in cases() {
        let spectrogram = MelSpectrogram::new(&config).unwrap();
        let mel = spectrogram.compute(&audio(&golden));
        let want = golden.get(&format!("{name}.mel"));
        assert_eq!(want.dims(), [mel.n_frames, mel.n_mels], "{name}");
        assert_eq!(mel.n_frames, spectrogram.n_frames(8000));
        assert_slices_close(
            &f64s(&mel.data),
            &values(&golden, &format!("{name}.mel")),
            Tol { atol: 1e-5, rtol: 1e-4 },
        );
    }
}

#[test]
fn filter_banks_match_librosa() {
    let golden = golden();
    for (name, config) in cases().into_iter().filter(|(name, _)| *name != "start") {
        let n_bins = config.n_fft / 2 + 1;
        let filters = mel_filterbank(&config).unwrap();
        let every_eighth: Vec<f64> = filters.chunks(n_bins).step_by(8).flat_map(f64s).collect();
        let want = values(&golden, &format!("{name}.filters"));
        assert_slices_close(&every_eighth, &want, Tol { atol: 1e-7, rtol: 1e-5 });
    }
}

#[test]
fn stft_with_a_short_window_matches_librosa() {
    let golden = golden();
    let got = stft_magnitude(&audio(&golden), 256, 200, 512, Some(PadMode::Reflect)).unwrap();
    assert_slices_close(&f64s(&got), &values(&golden, "stft"), Tol { atol: 1e-5, rtol: 1e-4 });
}

#[test]
fn the_spectral_centroid_matches_librosa() {
    let golden = golden();
    let got = spectral_centroid_hz(&audio(&golden), 16000);
    assert_slices_close(&[got], &values(&golden, "centroid_hz"), Tol { atol: 0.0, rtol: 1e-5 });
}

#[test]
fn loudness_matches_pyloudnorm_at_three_rates() {
    let want = values(&golden(), "lufs");
    let got: Vec<f64> = [16000u32, 44100, 48000]
        .iter()
        .map(|&rate| {
            let tau = 2.0 * std::f64::consts::PI;
            let (mut left, mut right) = (Vec::new(), Vec::new());
            for i in 0..2 * rate {
                let t = f64::from(i) / f64::from(rate);
                left.push((0.3 * (tau * 997.0 * t).sin() * if t < 1.0 { 1.0 } else { 0.05 }) as f32);
                right.push((0.1 * (tau * 70.0 * t).sin()) as f32);
            }
            lufs(&[&left, &right], rate)
        })
        .collect();
    assert_slices_close(&got, &want, Tol { atol: 1e-3, rtol: 0.0 });
}

#[test]
fn settings_that_do_not_fit_are_named() {
    let (_, good) = cases()[0].clone();
    let bad = [
        (MelConfig { hop: 0, ..good.clone() }, "setting `hop` does not fit: expected at least 1, found 0"),
        (
            MelConfig { win_length: 2000, ..good.clone() },
            "`win_length` does not fit: expected 1 to n_fft = 1024, found 2000",
        ),
        (
            MelConfig { f_max: 9000.0, ..good.clone() },
            "expected 0 <= f_min < f_max <= 8000 Hz, half the sample rate, found 0, 9000",
        ),
        (MelConfig { n_mels: 0, ..good }, "`n_mels` does not fit"),
    ];
    for (config, want) in bad {
        let message = MelSpectrogram::new(&config).err().unwrap().to_string();
        assert!(message.contains(want), "{message}");
    }
}
