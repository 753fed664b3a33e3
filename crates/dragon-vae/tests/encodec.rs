//! Against encodec 0.1.1 and transformers 4.57: `fixtures/dragon-vae/encodec/generate.py`.

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use dragon_nn::{Checkpoint, Loader, Rng};
use dragon_testkit::{Golden, Tol, assert_close, fixture};
use dragon_vae::encodec::published::{self, Names};
use dragon_vae::encodec::{Config, Encodec, Norm};

const CPU: Device = Device::Cpu;

fn folder(name: &str) -> std::path::PathBuf {
    fixture("dragon-vae/encodec").join(name)
}

/// What a model is loaded from.
fn file(name: &str) -> std::path::PathBuf {
    if name == "encodec_32khz" { folder(name) } else { folder(name).join("model.th") }
}

fn load(name: &str) -> Encodec {
    Encodec::load(&file(name), &CPU).unwrap()
}

fn noise(shape: &[usize]) -> Tensor {
    (Rng::from_key("audio", 0).normal_tensor(shape, DType::F32, &CPU).unwrap() * 0.3).unwrap()
}

#[test]
fn latents_codes_and_audio_match_the_references() {
    for name in ["encodec_24khz", "encodec_48khz", "encodec_32khz"] {
        let model = load(name);
        let golden = Golden::fixture(format!("dragon-vae/encodec/{name}/golden.safetensors"));
        for length in [3, 150, 200] {
            let get = |key: &str| golden.get(&format!("{length}.{key}"));
            let latents = model.encode(&get("audio")).unwrap();
            assert_close(&latents, &get("latents"), Tol::MODEL);
            let codes = model.quantize(&get("latents"), 3).unwrap().to_dtype(DType::I64).unwrap();
            assert_eq!(codes.flatten_all().unwrap().to_vec1::<i64>().unwrap(), {
                get("codes").flatten_all().unwrap().to_vec1::<i64>().unwrap()
            });
            assert_close(&model.decode_codes(&get("codes")).unwrap(), &get("decoded"), Tol::MODEL);
        }
    }
}

/// Names and shapes of a published model.
fn shapes(file: &str) -> Vec<(String, Vec<usize>)> {
    let text = std::fs::read_to_string(folder(file)).unwrap();
    let line = |line: &str| {
        let (name, shape) = line.split_once('\t').unwrap();
        (name.to_string(), shape.split(',').map(|n| n.parse().unwrap()).collect())
    };
    text.lines().map(line).collect()
}

#[test]
fn the_published_models_have_the_tensors_that_ours_ask_for() {
    let fits = |cfg: &Config, shapes: Vec<(String, Vec<usize>)>| {
        let checkpoint = Checkpoint::without_data(shapes);
        let names = Names::of(&checkpoint);
        let loader = Loader::new(checkpoint, move |name| vec![names.name(name)]);
        Encodec::new(cfg, loader.builder(DType::F32, &CPU)).unwrap();
        let tensors = loader.finish(published::is_unneeded).unwrap();
        tensors.values().map(Tensor::elem_count).sum::<usize>()
    };
    for (name, cfg, n) in [
        ("encodec_24khz", Config::encodec_24khz(), 19_046_114),
        ("encodec_48khz", Config::encodec_48khz(), 16_953_446),
    ] {
        let own = shapes(&format!("{name}.shapes"));
        assert_eq!(published::config_of(&Checkpoint::without_data(own.clone())), Ok(cfg.clone()), "{name}");
        assert_eq!(fits(&cfg, own), n, "{name}");
    }
    for (name, cfg) in [
        ("encodec_24khz", Config::encodec_24khz()),
        ("encodec_48khz", Config::encodec_48khz()),
        ("encodec_32khz", Config::encodec_32khz()),
    ] {
        let json = std::fs::read_to_string(folder(&format!("hugging_face_{name}.json"))).unwrap();
        assert_eq!(published::read_config(&serde_json::from_str(&json).unwrap()), Ok(cfg.clone()), "{name}");
        let new = shapes(&format!("hugging_face_{name}.shapes"));
        // The files were written when PyTorch stored weight norm otherwise.
        let old = new.iter().map(|(name, shape)| {
            let name = name.replace("parametrizations.weight.original0", "weight_g");
            (name.replace("parametrizations.weight.original1", "weight_v"), shape.clone())
        });
        assert_eq!(fits(&cfg, new.clone()), fits(&cfg, old.collect()));
    }
}

#[test]
fn long_audio_in_pieces_equals_the_whole_bit_for_bit() {
    for name in ["encodec_24khz", "encodec_32khz"] {
        let pieces = load(name);
        // A piece is four seconds: at the highest rate, these clips are one.
        let whole = Config { sample_rate_hz: 400_000, ..pieces.config().clone() };
        let (_, checkpoint) = published::open(&file(name)).unwrap();
        let names = Names::of(&checkpoint);
        let loader = Loader::new(checkpoint, move |name| vec![names.name(name)]);
        let whole = Encodec::new(&whole, loader.builder(DType::F32, &CPU)).unwrap();
        let piece = 4 * pieces.config().sample_rate_hz as usize;
        for samples in [2 * piece + 7, 2 * piece, piece + 1] {
            let audio = noise(&[1, 1, samples]);
            let latents = whole.encode(&audio).unwrap();
            assert_eq!(latents.dim(2).unwrap(), samples.div_ceil(15));
            assert_close(&pieces.encode(&audio).unwrap(), &latents, Tol::EXACT);
            let decoded = whole.decode(&latents).unwrap();
            assert_close(&pieces.decode(&latents).unwrap(), &decoded, Tol::EXACT);
        }
    }
}

#[test]
fn a_clip_depends_on_itself_only_and_not_on_the_threads() {
    for name in ["encodec_24khz", "encodec_48khz", "encodec_32khz"] {
        let model = load(name);
        let audio = noise(&[3, model.config().audio_channels, 4001]);
        let on = |n: usize, audio: &Tensor| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap();
            let latents = pool.install(|| model.encode(audio)).unwrap();
            let decoded = pool.install(|| model.decode(&latents)).unwrap();
            (latents, decoded)
        };
        let (latents, decoded) = on(1, &audio);
        let several = on(3, &audio);
        assert_close(&several.0, &latents, Tol::EXACT);
        assert_close(&several.1, &decoded, Tol::EXACT);
        let alone = on(2, &audio.narrow(0, 2, 1).unwrap());
        assert_close(&alone.0, &latents.narrow(0, 2, 1).unwrap(), Tol::EXACT);
        assert_close(&alone.1, &decoded.narrow(0, 2, 1).unwrap(), Tol::EXACT);
        // Silence, and one sample, are audio too.
        for audio in [audio.zeros_like().unwrap(), audio.narrow(2, 0, 1).unwrap()] {
            let sum = model.encode(&audio).unwrap().sqr().unwrap().sum_all().unwrap();
            assert!(sum.to_scalar::<f32>().unwrap().is_finite());
        }
    }
}

#[test]
fn the_causal_model_does_not_hear_what_comes() {
    let model = load("encodec_24khz");
    let audio = noise(&[1, 1, 300]);
    let part = model.encode(&audio.narrow(2, 0, 150).unwrap()).unwrap();
    let whole = model.encode(&audio).unwrap();
    assert_close(&part, &whole.narrow(2, 0, 10).unwrap(), Tol::EXACT);
}

#[test]
fn misfits_are_named() {
    let message = |path: &std::path::Path| Encodec::load(path, &CPU).unwrap_err().to_string();
    let dac = message(&fixture("dragon-vae/dac/case.safetensors"));
    assert!(dac.contains("expected the tensors of an EnCodec"), "{dac}");
    let clap = message(&fixture("dragon-encoders/clap/huggingface"));
    assert!(clap.contains("`model_type`: expected \"encodec\""), "{clap}");

    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(folder("encodec_32khz/config.json"), dir.path().join("config.json")).unwrap();
    std::fs::copy(folder("encodec_24khz/model.th"), dir.path().join("model.th")).unwrap();
    let other = message(dir.path());
    // Every tensor of the other model, whose residual units have a shortcut.
    assert!(other.contains("`encoder.model.1.shortcut.conv.conv.bias`: not used"), "{other}");

    let model = load("encodec_48khz");
    for (result, part) in [
        (model.encode(&noise(&[1, 1, 100])), "audio of 2 channels"),
        (model.decode(&noise(&[1, 5, 100])), "latents of 6 channels"),
        (model.quantize(&noise(&[1, 6, 2]), 4), "1 to 3 codebooks"),
        (model.dequantize(&Tensor::full(16u32, (1, 3, 2), &CPU).unwrap()), "codes below 16, found 16"),
    ] {
        let message = result.unwrap_err().to_string();
        assert!(message.contains(part), "{message}");
    }
    let impossible = Config { causal: true, norm: Norm::TimeGroup, ..Config::encodec_24khz() };
    assert!(Encodec::new(&impossible, VarBuilder::zeros(DType::F32, &CPU)).is_err());
}
