use super::*;
use crate::settings::Tail;
use dragon_testkit::{Golden, Tol, assert_slices_close, fixture};

fn model(weights: &str) -> Musicnn {
    Musicnn::load(fixture(format!("musicnn/{weights}_musicnn.safetensors"))).unwrap()
}

fn golden() -> Golden {
    Golden::read(fixture("dragon-encoders/musicnn/musicnn.safetensors"))
}

fn floats(golden: &Golden, name: &str) -> Vec<f32> {
    let tensor = golden.get(name).to_dtype(candle_core::DType::F32).unwrap();
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

fn samples() -> Vec<f32> {
    floats(&golden(), "samples").into_iter().map(|x| x / 32768.0).collect()
}

#[track_caller]
fn close(got: &[f32], want: &[f32], atol: f64) {
    let wide = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
    assert_slices_close(&wide(got), &wide(want), Tol { atol, rtol: 0.0 });
}

/// 0.256 s: 9 windows in 5.12 s.
const FADTK: Setting = Setting::Fadtk { hop_s: 0.256, tail: Tail::WholeWindows };

#[test]
fn network_matches_tensorflow() {
    let golden = golden();
    let patches = floats(&golden, "patches");
    for weights in ["msd", "mtt"] {
        let model = model(weights);
        let outputs: Vec<Output> =
            patches.chunks(N_FRAMES * N_MELS).flat_map(|patch| model.outputs(patch, &[0]).unwrap()).collect();
        assert_eq!(outputs.len(), 6);
        let embeddings: Vec<f32> = outputs.iter().flat_map(|o| o.embedding.clone()).collect();
        let tags: Vec<f32> = outputs.iter().flat_map(|o| o.tags.clone()).collect();
        close(&embeddings, &floats(&golden, &format!("{weights}.patch_embeddings")), 5e-5);
        close(&tags, &floats(&golden, &format!("{weights}.patch_tags")), 1e-5);
    }
}

#[test]
fn log_mel_matches_librosa() {
    let golden = golden();
    let got = model("mtt").log_mel(&samples());
    assert_eq!(got.len(), 321 * N_MELS);
    let rows: Vec<u32> = golden.get("log_mel_rows").to_vec1().unwrap();
    let got: Vec<f32> =
        rows.iter().flat_map(|&row| got[row as usize * N_MELS..][..N_MELS].to_vec()).collect();
    close(&got, &floats(&golden, "log_mel"), 2e-5);
}

#[test]
fn clip_matches_librosa_and_tensorflow() {
    let golden = golden();
    let samples = samples();
    for weights in ["msd", "mtt"] {
        let model = model(weights);
        // The golden windows were not peak-normalised.
        let outputs =
            model.outputs(&model.log_mel(&samples), &(0..=128).step_by(16).collect::<Vec<_>>()).unwrap();
        let embeddings: Vec<f32> = outputs.iter().flat_map(|o| o.embedding.clone()).collect();
        let tags: Vec<f32> = outputs.iter().flat_map(|o| o.tags.clone()).collect();
        close(&embeddings, &floats(&golden, &format!("{weights}.window_embeddings")), 1e-4);
        close(&tags, &floats(&golden, &format!("{weights}.window_tags")), 1e-4);
    }
}

#[test]
fn overlapping_windows_give_what_each_gives_alone() {
    let model = model("mtt");
    let log_mel = model.log_mel(&samples());
    for starts in [vec![0, 16, 32, 48, 64, 80, 96, 112, 128], vec![0, 1, 2, 3, 70, 134], vec![134, 5, 5]] {
        let together = model.outputs(&log_mel, &starts).unwrap();
        for (&start, got) in starts.iter().zip(&together) {
            let window = &log_mel[start * N_MELS..(start + N_FRAMES) * N_MELS];
            let alone = model.outputs(window, &[0]).unwrap().remove(0);
            close(&got.embedding, &alone.embedding, 1e-5);
            close(&got.tags, &alone.tags, 1e-5);
        }
    }
}

#[test]
fn many_windows_give_what_few_give() {
    let model = model("mtt");
    let log_mel = model.log_mel(&samples());
    let starts: Vec<usize> = (0..=134).rev().step_by(3).collect(); // more than one group
    let all = model.outputs(&log_mel, &starts).unwrap();
    for (i, got) in all.iter().enumerate().step_by(11) {
        let alone = model.outputs(&log_mel, &starts[i..=i]).unwrap();
        close(&got.embedding, &alone[0].embedding, 1e-5);
    }
    assert!(model.outputs(&log_mel, &[135]).is_err());
}

#[test]
fn the_same_clip_gives_the_same_bits_with_any_number_of_threads_and_in_any_batch() {
    let model = model("mtt");
    let song = samples();
    let other: Vec<f32> = song.iter().rev().copied().collect();
    let on = |threads: usize, clips: &[&[f32]]| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| model.embed_clips(clips, &FADTK)).unwrap()
    };
    let one = on(1, &[&song, &other, &song]);
    assert_eq!((one[0].n, one[0].dim), (9, DIM));
    assert_eq!(one, on(2, &[&song, &other, &song]));
    assert_eq!(one, on(3, &[&song, &other, &song]));
    assert_eq!(one[0], one[2]);
    assert_eq!(one[1], model.embed_clip(&other, &FADTK).unwrap());
    assert_ne!(one[0], one[1]);
}

#[test]
fn both_settings_ignore_the_level_of_the_song() {
    let model = model("mtt");
    let song = samples();
    let quiet: Vec<f32> = song.iter().map(|x| x / 64.0).collect();
    for setting in [Setting::MA, FADTK] {
        let (loud, quiet) =
            (model.embed_clip(&song, &setting).unwrap(), model.embed_clip(&quiet, &setting).unwrap());
        assert_eq!(loud.n, 9);
        close(&loud.data, &quiet.data, 1e-4);
    }
}

#[test]
fn silence_is_embedded_without_nan() {
    let model = model("mtt");
    for setting in [Setting::MA, FADTK] {
        let silence = model.embed_clip(&vec![0.0; 81920], &setting).unwrap();
        assert!(silence.n == 9 && silence.data.iter().all(|x| x.is_finite()));
    }
}

#[test]
fn short_clips_repeat_and_shorter_ones_are_refused() {
    let model = model("mtt");
    let song = samples();
    assert_eq!(model.embed_clip(&song[..20000], &FADTK).unwrap().n, 1);
    assert_eq!(model.embed_clip(&song[..20000], &Setting::MA).unwrap().n, 9);
    let error = model.embed_clip(&song[..4000], &FADTK).unwrap_err().to_string();
    let want = "the clip is too short: expected at least 4762 samples (a tenth of the encoder's window of 47616), found 4000\nhint: leave it out, or use a longer recording";
    assert_eq!(error, want);
}

#[test]
fn a_padded_tail_adds_windows_up_to_the_end_of_the_song() {
    let model = model("mtt");
    let padded = Setting::Fadtk { hop_s: 0.512, tail: Tail::ZeroPadded };
    let whole = Setting::Fadtk { hop_s: 0.512, tail: Tail::WholeWindows };
    let (padded, whole) =
        (model.embed_clip(&samples(), &padded).unwrap(), model.embed_clip(&samples(), &whole).unwrap());
    assert_eq!((padded.n, whole.n), (10, 5));
    // Only the mirrored end of the whole-window spectrogram differs, by one frame of the last window.
    close(&padded.data[..4 * DIM], &whole.data[..4 * DIM], 1e-5);
}

#[test]
fn a_clip_of_another_rate_is_refused() {
    let clip = dragon_audio::Clip { samples: vec![0.0; 81920], sample_rate_hz: 44100 };
    let error = model("mtt").embed_audio(&clip, &FADTK).unwrap_err().to_string();
    assert_eq!(error, "encoder `musicnn-mtt` reads 16000 Hz, the clip has 44100 Hz\nhint: resample it first");
}

#[test]
fn the_vae_setting_is_refused() {
    let error =
        model("mtt").embed_clip(&samples(), &Setting::Vae { latent_direct: true }).unwrap_err().to_string();
    assert!(error.starts_with("`setting`: expected `ma` or `fadtk` for an encoder of windows"), "{error}");
}

#[test]
fn foreign_weights_are_refused_with_every_problem() {
    let path = fixture("dragon-encoders/musicnn/musicnn.safetensors");
    let error = Musicnn::load(path).map(|_| ()).unwrap_err().to_string();
    for part in [
        "`input_norm.beta`: missing, expected [1]",
        "`midend.2.conv.kernel`: missing, expected [7, 64, 1, 64]",
        "`patches`: unused",
        "metadata `tags`",
    ] {
        assert!(error.contains(part), "{part} is not in {error}");
    }
    assert!(Musicnn::load("no/such/file").is_err());
    assert!(Musicnn::from_bytes(b"not weights", "memory").is_err());
}

#[test]
fn tags_name_what_is_heard() {
    let model = model("mtt");
    assert_eq!((model.tags().len(), model.id()), (N_TAGS, "musicnn-mtt"));
    let tags = model.tag_clip(&samples()).unwrap();
    assert!(tags[..5].iter().any(|tag| tag.0 == "electronic"), "{tags:?}");
    assert!(tags.windows(2).all(|pair| pair[0].1 >= pair[1].1));
}
