use super::*;
use crate::encoder::AudioEncoder;
use crate::htsat::LogMel;
use crate::tokenizer::Tokenizer;
use candle_core::{DType, Device};
use dragon_nn::Params;
use dragon_testkit::{Golden, Tol, assert_close};

const TOL: Tol = Tol { atol: 1e-4, rtol: 1e-3 }; // a tiny model end to end

fn golden() -> (Golden, Clap) {
    let golden = Golden::fixture("dragon-encoders/clap/tiny.safetensors");
    let params = Params::new(0);
    let model = Clap::new(&Config::tiny(), params.builder(DType::F32, &Device::Cpu)).unwrap();
    params.load_tensors(&golden.with_prefix("weights."), "").unwrap();
    (golden, model)
}

fn captions() -> Vec<String> {
    ["jig", "reel", "waltz", "slow air"].iter().map(|t| format!("a lively {t} on fiddle and flute")).collect()
}

fn encoder(seed: u64) -> ClapEncoder {
    let tokenizer = Tokenizer::train(&captions(), 50).unwrap();
    ClapEncoder::new(&Config::tiny(), tokenizer, seed, &Device::Cpu).unwrap()
}

fn clip(pitch_hz: f32) -> Vec<f32> {
    (0..6000).map(|i| 0.4 * (std::f32::consts::TAU * pitch_hz * i as f32 / 8000.0).sin()).collect()
}

#[test]
fn the_front_end_matches_laion_clap() {
    let (golden, model) = golden();
    let clips: Vec<Vec<f32>> = golden.get("clips").to_vec2().unwrap();
    let log_mel = LogMel::new(&model.config().audio).unwrap();
    let rows: Vec<f32> = clips.iter().flat_map(|c| log_mel.compute(c).unwrap()).collect();
    let want = golden.get("log_mel");
    let got = Tensor::from_vec(rows, want.dims(), &Device::Cpu).unwrap();
    // dB of f32 spectra: near the floor, where the second clip has died away, cancellation decides
    assert_close(&got, &want, Tol { atol: 2e-3, rtol: 1e-3 });
}

#[test]
fn audio_branch_matches_laion_clap() {
    let (golden, model) = golden();
    let log_mel = golden.get("log_mel");
    assert_close(&model.audio_branch.forward(&log_mel).unwrap(), &golden.get("embedding"), TOL);
    assert_close(&model.embed_log_mel(&log_mel).unwrap(), &golden.get("audio_embedding"), TOL);
}

#[test]
fn text_branch_matches_transformers() {
    let (golden, model) = golden();
    let (ids, mask) = (golden.get("ids"), golden.get("mask"));
    let states = model.text_branch.forward(&ids, &mask).unwrap();
    assert_close(&model.text_branch.pool(&states).unwrap(), &golden.get("pooled"), TOL);
    assert_close(&model.embed_tokens(&ids, &mask).unwrap(), &golden.get("text_embedding"), TOL);
}

#[test]
fn the_loss_matches_pytorch_and_starts_at_ln_b_when_nothing_differs() {
    let (golden, model) = golden();
    let (audio, text) =
        (golden.get("audio_embedding"), golden.get("text_embedding").narrow(0, 0, 2).unwrap());
    let loss = contrastive_loss(&audio, &text, model.logit_scale(), None).unwrap();
    assert_close(&loss, &golden.get("loss"), Tol { atol: 1e-5, rtol: 1e-4 });
    let same = audio.narrow(0, 0, 1).unwrap().broadcast_as((2, 12)).unwrap().contiguous().unwrap();
    let loss = contrastive_loss(&same, &same, model.logit_scale(), None).unwrap().to_scalar::<f32>().unwrap();
    assert!((loss - 2f32.ln()).abs() < 1e-6, "{loss}");
}

#[test]
fn texts_with_the_same_words_are_no_negatives() {
    let scale = Tensor::new(3f32, &Device::Cpu).unwrap();
    let rows = Tensor::new(&[[1f32, 0.], [1., 0.]], &Device::Cpu).unwrap();
    let same = Tensor::new(&[[0f32, 1.], [1., 0.]], &Device::Cpu).unwrap();
    let loss = contrastive_loss(&rows, &rows, &scale, Some(&same)).unwrap().to_scalar::<f32>().unwrap();
    assert_eq!(loss, 0.0);
}

#[test]
fn the_gradient_of_the_loss_matches_finite_differences() {
    let rows = |seed: &str| {
        let mut rng = dragon_nn::Rng::from_key(seed, 0);
        rng.normal_tensor((4, 5), DType::F64, &Device::Cpu).unwrap()
    };
    let inputs = [rows("audio"), rows("text"), Tensor::new(0.7f64, &Device::Cpu).unwrap()];
    dragon_testkit::gradient_check(&inputs, Tol { atol: 1e-7, rtol: 1e-5 }, |t| {
        contrastive_loss(&unit_rows(&t[0])?, &unit_rows(&t[1])?, &t[2], None)
    })
    .unwrap();
}

#[test]
fn every_trained_parameter_gets_a_gradient_and_the_statistics_get_none() {
    let encoder = encoder(5);
    let clips = [clip(300.0), clip(700.0), clip(1500.0), clip(2500.0)];
    let views: Vec<&[f32]> = clips.iter().map(Vec::as_slice).collect();
    let tokens = encoder.tokens(&captions()).unwrap();
    let audio = encoder.model.embed_log_mel(&encoder.log_mel(&views).unwrap()).unwrap();
    let text = encoder.model.embed_tokens(&tokens.ids, &tokens.mask).unwrap();
    let loss = contrastive_loss(&audio, &text, encoder.model.logit_scale(), None).unwrap();
    let grads = loss.backward().unwrap();
    for (name, var) in encoder.params.names_and_vars() {
        let size = grads.get(&var).map(|g| g.abs().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap());
        if name.contains("running_") {
            assert!(size.is_none(), "`{name}` has a gradient");
        } else {
            let size = size.unwrap_or_else(|| panic!("`{name}` has no gradient"));
            // a bias on all keys moves no softmax: its gradient is rounding noise
            let moves = !name.ends_with("key.bias");
            assert!(size.is_finite() && (size > 0.0 || !moves), "`{name}`: gradient sum {size}");
        }
    }
}

#[test]
fn a_clip_and_a_caption_embed_the_same_alone_and_in_a_batch() {
    let encoder = encoder(5);
    let clips = [clip(300.0), clip(700.0), clip(1500.0)];
    let views: Vec<&[f32]> = clips.iter().map(Vec::as_slice).collect();
    let together = encoder.embed_clips(&views).unwrap();
    assert_eq!(together[1], encoder.embed_clips(&views[1..2]).unwrap()[0]);
    let norm: f32 = together[1].iter().map(|x| x * x).sum();
    assert!((norm - 1.0).abs() < 1e-5, "{norm}");
    let texts = captions();
    assert_eq!(encoder.embed_captions(&texts).unwrap()[2], encoder.embed_captions(&texts[2..3]).unwrap()[0]);
}

#[test]
fn a_saved_folder_gives_the_same_embeddings() {
    let folder = tempfile::tempdir().unwrap();
    let encoder = encoder(9);
    encoder.save(folder.path().join("clap")).unwrap();
    let read = ClapEncoder::load(folder.path().join("clap"), &Device::Cpu).unwrap();
    let clip = clip(500.0);
    assert_eq!(encoder.embed_clips(&[&clip]).unwrap(), read.embed_clips(&[&clip]).unwrap());
    assert_eq!(encoder.embed_captions(&captions()).unwrap(), read.embed_captions(&captions()).unwrap());
    assert!(read.id().starts_with("clap-") && read.id() != "clap-new");
}

#[test]
fn broken_folders_and_empty_captions_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let message = |e: Error| e.to_string();
    let load = || ClapEncoder::load(folder.path(), &Device::Cpu).err().unwrap();
    assert!(message(load()).contains("config.json"));
    encoder(1).save(folder.path()).unwrap();
    std::fs::write(folder.path().join("config.json"), r#"{"joint": 3}"#).unwrap();
    assert!(message(load()).contains("unknown field `joint`"));
    let wider = Config { joint_dim: 14, ..Config::tiny() };
    let json = serde_json::to_string(&wider).unwrap();
    std::fs::write(folder.path().join("config.json"), json).unwrap();
    let text = message(load());
    assert!(text.contains("`audio_projection.2.weight`: expected [14, 14], found [12, 12]"), "{text}");
    let text = encoder(1).embed_captions(&["a jig", ""]).unwrap_err().to_string();
    assert!(text.starts_with("caption 1 is empty"), "{text}");
}

#[test]
fn the_tiny_preset_keeps_its_size() {
    let params = Params::new(0);
    Clap::new(&Config::tiny_music(), params.builder(DType::F32, &Device::Cpu)).unwrap();
    let n = params.len_params();
    assert!(n < 1_500_000, "{n}");
    assert_eq!(Config::tiny_music().audio.n_frames(), Config::tiny_music().audio.image_frames());
}
