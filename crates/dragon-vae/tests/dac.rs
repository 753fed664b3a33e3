//! Against descript-audio-codec 1.0.0 and transformers 4.57: `fixtures/dragon-vae/dac_codec/generate.py`.

use candle_core::{DType, Device, Tensor};
use dragon_nn::{Checkpoint, Loader, Rng};
use dragon_testkit::{Golden, Tol, assert_close, fixture};
use dragon_vae::dac::published::{self, Names};
use dragon_vae::dac::{Config, Dac};

const CPU: Device = Device::Cpu;

fn folder(name: &str) -> std::path::PathBuf {
    fixture("dragon-vae/dac_codec").join(name)
}

fn load(name: &str) -> Dac {
    let path = if name == "descript" { folder("descript/weights.pth") } else { folder(name) };
    Dac::load(&path, &CPU).unwrap()
}

#[test]
fn latents_codes_and_audio_match_the_references() {
    for (name, lengths) in [("descript", [1024, 1300]), ("hugging_face", [200, 207])] {
        let model = load(name);
        let golden = Golden::fixture(format!("dragon-vae/dac_codec/{name}/golden.safetensors"));
        for length in lengths {
            let get = |key: &str| golden.get(&format!("{length}.{key}"));
            assert_close(&model.encode(&get("audio")).unwrap(), &get("latents"), Tol::LAYER);
            let codes = model.quantize(&get("latents"), 3).unwrap().to_dtype(DType::I64).unwrap();
            let list = |codes: &Tensor| codes.flatten_all().unwrap().to_vec1::<i64>().unwrap();
            assert_eq!(list(&codes), list(&get("codes")));
            let decoded = model.decode(&model.dequantize(&codes).unwrap()).unwrap();
            assert_close(&decoded, &get("decoded"), Tol::LAYER);
        }
    }
}

#[test]
fn the_published_models_have_the_tensors_that_ours_ask_for() {
    let shapes = |file: String| -> Vec<(String, Vec<usize>)> {
        let text = std::fs::read_to_string(folder(&file)).unwrap();
        let line = |line: &str| {
            let (name, shape) = line.split_once('\t').unwrap();
            (name.to_string(), shape.split(',').map(|n| n.parse().unwrap()).collect())
        };
        text.lines().map(line).collect()
    };
    let fits = |cfg: &Config, shapes: Vec<(String, Vec<usize>)>| {
        let checkpoint = Checkpoint::without_data(shapes);
        let names = Names::of(&checkpoint);
        let loader = Loader::new(checkpoint, move |name| vec![names.name(name)]);
        Dac::new(cfg, loader.builder(DType::F32, &CPU)).unwrap();
        loader.finish(|_| false).unwrap();
    };
    for (name, cfg) in [
        ("dac_44khz", Config::dac_44khz()),
        ("dac_24khz", Config::dac_24khz()),
        ("dac_16khz", Config::dac_16khz()),
        ("dac_44khz_16kbps", Config::dac_44khz_16kbps()),
    ] {
        let own = shapes(format!("{name}.shapes"));
        assert_eq!(published::config_of(&Checkpoint::without_data(own.clone())), Ok(cfg.clone()), "{name}");
        fits(&cfg, own);
        if cfg.latent_dim == 1024 {
            fits(&cfg, shapes(format!("hugging_face_{name}.shapes")));
        }
    }
}

#[test]
fn a_clip_depends_on_itself_only_and_not_on_the_threads() {
    let model = load("hugging_face");
    let audio =
        (Rng::from_key("audio", 0).normal_tensor((3, 1, 4001), DType::F32, &CPU).unwrap() * 0.3).unwrap();
    let on = |n: usize, audio: &Tensor| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap();
        pool.install(|| model.encode(audio)).unwrap()
    };
    let latents = on(1, &audio);
    assert_close(&on(3, &audio), &latents, Tol::EXACT);
    assert_close(&on(2, &audio.narrow(0, 2, 1).unwrap()), &latents.narrow(0, 2, 1).unwrap(), Tol::EXACT);
    let silence = model.encode(&audio.zeros_like().unwrap()).unwrap().sqr().unwrap().sum_all().unwrap();
    assert!(silence.to_scalar::<f32>().unwrap().is_finite());
}

#[test]
fn misfits_are_named() {
    let message = |path: &std::path::Path| Dac::load(path, &CPU).unwrap_err().to_string();
    let encodec = message(&fixture("dragon-vae/encodec/encodec_24khz/model.th"));
    assert!(encodec.contains("expected the tensors of a DAC"), "{encodec}");
    let encodec = message(&fixture("dragon-vae/encodec/encodec_32khz"));
    assert!(encodec.contains("`model_type`: expected \"dac\", found \"encodec\""), "{encodec}");
    let model = load("descript");
    let stereo = Tensor::zeros((1, 2, 1024), DType::F32, &CPU).unwrap();
    assert!(model.encode(&stereo).unwrap_err().to_string().contains("mono"));
    let codes = Tensor::full(16u32, (1, 3, 2), &CPU).unwrap();
    assert!(model.dequantize(&codes).unwrap_err().to_string().contains("below 16, found 16"));
}
