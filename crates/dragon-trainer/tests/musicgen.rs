//! Prompts to audio by a tiny MusicGen in its published layout, beside transformers
//! (`fixtures/dragon-musicgen/musicgen/generate.py`).

use candle_core::{DType, Device, Tensor};
use dragon_nn::write_safetensors;
use dragon_testkit::{Golden, Tol, assert_close, fixture};
use dragon_trainer::generate::Wanted;
use dragon_trainer::musicgen::{self, Config, Pipeline, is_published};
use dragon_trainer::{Result, RunContext};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

const CPU: Device = Device::Cpu;
/// Those of the golden file.
const PROMPTS: [&str; 2] = ["a slow harp melody", "a fast jig on a violin with drums"];

fn golden() -> Golden {
    Golden::fixture("dragon-musicgen/musicgen/case.safetensors")
}

fn weights() -> BTreeMap<String, Tensor> {
    let path = fixture("dragon-musicgen/musicgen/case.safetensors");
    let all = candle_core::safetensors::load(path, &CPU).unwrap();
    all.into_iter().filter_map(|(k, v)| Some((k.strip_prefix("weights.")?.to_string(), v))).collect()
}

fn write_weights(dir: &Path, tensors: &BTreeMap<String, Tensor>) {
    write_safetensors(dir.join("model.safetensors"), tensors, &BTreeMap::new()).unwrap();
}

fn config_json() -> Value {
    let text = std::fs::read_to_string(fixture("dragon-musicgen/musicgen/case.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

fn write_config(dir: &Path, json: &Value) {
    std::fs::write(dir.join("config.json"), json.to_string()).unwrap();
}

fn write_model(dir: &Path) {
    std::fs::create_dir_all(dir).unwrap();
    write_config(dir, &config_json());
    write_weights(dir, &weights());
    std::fs::copy(fixture("dragon-musicgen/musicgen/tokenizer.json"), dir.join("tokenizer.json")).unwrap();
}

fn config(model: &Path) -> Config {
    Config {
        model: model.to_owned(),
        seconds: 0.0119, // 11.9 frames of 8 samples
        guidance_scale: 3.0,
        top_k: 20,
        temperature: 1.0,
        batch: 2,
    }
}

fn run(cfg: &Config, seed: u64, ctx: &RunContext) -> Result<Vec<PathBuf>> {
    let prompts: Vec<String> = PROMPTS.into_iter().chain(["drums"]).map(str::to_owned).collect();
    musicgen::run(cfg, &Wanted::variants(&prompts, seed, 1)?, ctx)
}

#[test]
fn a_published_folder_gives_the_states_and_the_audio_of_transformers() {
    let (dir, golden) = (tempfile::tempdir().unwrap(), golden());
    write_model(dir.path());
    let check = || {
        let pipeline = Pipeline::load(dir.path(), &CPU).unwrap();
        let texts = pipeline.texts(&PROMPTS).unwrap();
        let mask = golden.get("mask").unsqueeze(2).unwrap();
        let masked = |t: &Tensor| t.broadcast_mul(&mask).unwrap();
        assert_close(&masked(&texts.states), &masked(&golden.get("states")), Tol { atol: 1e-5, rtol: 1e-4 });
        let audio = pipeline.decode(&golden.get("codes")).unwrap();
        let want = golden.get("audio");
        for (i, audio) in audio.iter().enumerate() {
            assert_eq!(audio.sample_rate_hz, 8000);
            let got = Tensor::new(audio.channels.clone(), &CPU).unwrap();
            assert_close(&got, &want.get(i).unwrap(), Tol { atol: 1e-5, rtol: 1e-4 });
        }
    };
    check();
    // Older files: weight norm under its old names, T5's table under both, positions that are computed.
    let mut old: BTreeMap<String, Tensor> = weights()
        .into_iter()
        .map(|(k, v)| {
            let k = k.replace("parametrizations.weight.original0", "weight_g");
            (k.replace("parametrizations.weight.original1", "weight_v"), v)
        })
        .collect();
    let table = old["text_encoder.shared.weight"].clone();
    old.insert("text_encoder.encoder.embed_tokens.weight".into(), table);
    let positions = Tensor::zeros((64, 32), DType::F32, &CPU).unwrap();
    old.insert("decoder.model.decoder.embed_positions.weights".into(), positions);
    write_weights(dir.path(), &old);
    check();
    old.remove("text_encoder.shared.weight").unwrap();
    write_weights(dir.path(), &old);
    check();
}

#[test]
fn greedy_pieces_are_those_of_transformers() {
    let dir = tempfile::tempdir().unwrap();
    let (model, out) = (dir.path().join("model"), dir.path().join("out"));
    write_model(&model);
    let cfg = Config { top_k: 1, seconds: 0.012, ..config(&model) };
    let files = run(&cfg, 3, &RunContext::new(&out)).unwrap();
    let want = golden().get("audio");
    for (i, file) in files.iter().take(PROMPTS.len()).enumerate() {
        let audio = dragon_audio::read(file).unwrap();
        let got = Tensor::new(audio.channels, &CPU).unwrap();
        let clipped = want.get(i).unwrap().clamp(-1f32, 1f32).unwrap();
        assert_close(&got, &clipped, Tol { atol: 1e-4, rtol: 0.0 }); // 16 bits
    }
}

#[test]
fn pieces_do_not_depend_on_their_batch() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    write_model(&model);
    assert!(is_published(&model) && !is_published(dir.path()));
    let files = run(&config(&model), 3, &RunContext::new(dir.path().join("a"))).unwrap();
    let names: Vec<_> = files.iter().map(|f| f.file_name().unwrap().to_str().unwrap()).collect();
    let want = ["000-a-slow-harp-melody.wav", "001-a-fast-jig-on-a-violin-with-drums.wav", "002-drums.wav"];
    assert_eq!(names, want);
    let audio = dragon_audio::read(&files[0]).unwrap();
    assert_eq!((audio.channels.len(), audio.channels[0].len(), audio.sample_rate_hz), (1, 95, 8000));
    let alone =
        run(&Config { batch: 1, ..config(&model) }, 3, &RunContext::new(dir.path().join("b"))).unwrap();
    for (one, alone) in files.iter().zip(&alone) {
        assert_eq!(std::fs::read(one).unwrap(), std::fs::read(alone).unwrap());
    }
    assert_ne!(std::fs::read(&files[0]).unwrap(), std::fs::read(&files[1]).unwrap());
    let other = run(&config(&model), 4, &RunContext::new(dir.path().join("c"))).unwrap();
    assert_ne!(std::fs::read(&files[0]).unwrap(), std::fs::read(&other[0]).unwrap());
    // Stopped before its first step.
    let mut ctx = RunContext::new(dir.path().join("d"));
    ctx.stop = Arc::new(AtomicBool::new(true));
    assert!(run(&config(&model), 3, &ctx).unwrap().is_empty());
}

#[test]
fn what_cannot_work_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let (model, out) = (dir.path().join("model"), dir.path().join("out"));
    write_model(&model);
    let message = |cfg: Config| {
        let err = run(&cfg, 3, &RunContext::new(&out)).unwrap_err();
        assert_eq!(err.exit_code(), 1, "{err}");
        err.to_string()
    };
    let base = config(&model);
    for (cfg, parts) in [
        (Config { seconds: 0.062, ..base.clone() }, ["`seconds`", "0.06"]),
        (Config { seconds: f64::NAN, ..base.clone() }, ["`seconds`", "NaN"]),
        (Config { top_k: 0, ..base.clone() }, ["`sampler.top_k`", "at least 1"]),
        (Config { temperature: 0.0, ..base.clone() }, ["`sampler.temperature`", "above 0"]),
        (Config { guidance_scale: 0.5, ..base.clone() }, ["`sampler.guidance_scale`", "at least 1"]),
    ] {
        let said = message(cfg);
        assert!(parts.iter().all(|part| said.contains(part)), "{said}");
    }
    // Another model's weights, or damaged ones: everything that does not fit, by the file's names.
    let mut broken = weights();
    broken.remove("decoder.lm_heads.3.weight").unwrap();
    broken.remove("audio_encoder.decoder.layers.0.conv.bias").unwrap();
    let short = broken["text_encoder.shared.weight"].narrow(0, 0, 1999).unwrap();
    broken.insert("text_encoder.shared.weight".into(), short);
    broken.insert("w".into(), Tensor::zeros(1, DType::F32, &CPU).unwrap());
    write_weights(&model, &broken);
    let said = message(base.clone());
    for part in [
        "`decoder.lm_heads.3.weight`: missing",
        "`audio_encoder.decoder.layers.0.conv.bias`: missing",
        "`text_encoder.shared.weight`: expected [2000, 12], found [1999, 12]",
        "`w`: not used",
    ] {
        assert!(said.contains(part), "{said}");
    }
    // A download that was cut short.
    write_weights(&model, &weights());
    let file = std::fs::OpenOptions::new().write(true).open(model.join("model.safetensors")).unwrap();
    file.set_len(100_000).unwrap();
    let said = message(base.clone());
    assert!(said.contains("model.safetensors"), "{said}");
    std::fs::remove_file(model.join("model.safetensors")).unwrap();
    let said = message(base.clone());
    assert!(said.contains("no checkpoint") && said.contains("hint"), "{said}");
    std::fs::remove_file(model.join("tokenizer.json")).unwrap();
    let said = message(base.clone());
    assert!(said.contains("tokenizer.json") && said.contains("hint"), "{said}");
    for (change, part) in [
        (("decoder", "audio_channels", 2), "`decoder.audio_channels`: expected 1, found 2"),
        (("decoder", "num_codebooks", 3), "the decoder writes 3 codebooks of 64, the codec reads 4 of 64"),
        (("text_encoder", "relative_attention_num_buckets", -1), "`text_encoder`"),
        (("audio_encoder", "trim_right_ratio", 2), "`audio_encoder`: `trim_right_ratio`"),
    ] {
        let mut json = config_json();
        json[change.0][change.1] = change.2.into();
        write_config(&model, &json);
        let said = message(base.clone());
        assert!(said.contains(part) && said.contains("config.json"), "{said}");
    }
    std::fs::remove_file(model.join("config.json")).unwrap();
    for name in ["state_dict.bin", "compression_state_dict.bin"] {
        std::fs::write(model.join(name), "").unwrap();
    }
    assert!(is_published(&model));
    let said = message(base);
    assert!(said.contains("audiocraft") && said.contains("hint"), "{said}");
    assert!(!out.exists());
}
