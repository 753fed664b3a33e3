//! Our side of `cargo xtask parity codecs`: EnCodec, DAC and VGGish on given audio, stage by stage.
//!
//! Usage: parity_codecs KIND PATH GIVEN OUT
//! KIND: `encodec`, `dac` or `vggish`; PATH: published file or folder; GIVEN: a safetensors file with `audio` (`[B, C, N]`, for
//! VGGish `[N]`), and for codecs `latents` `[B, D, T]`, `codes` `[B, K, T]` and `song` `[N]`; OUT: what comes of each.

use candle_core::{Device, Tensor};
use dragon_encoders::codec::Codec;
use dragon_encoders::vggish::{DIM, Vggish};
use dragon_encoders::{AudioEncoder, Embeddings, Setting};
use dragon_vae::dac::Dac;
use dragon_vae::encodec::Encodec;
use std::collections::BTreeMap;
use std::error::Error;
use std::path::Path;
use std::time::Instant;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [kind, path, given, out] = arguments.as_slice() else {
        return Err("expected KIND PATH GIVEN OUT".into());
    };
    // As the `dragon` binary does.
    rayon::ThreadPoolBuilder::new().use_current_thread().build_global()?;
    let (path, device) = (Path::new(path), Device::Cpu);
    let given = candle_core::safetensors::load(given, &device)?;
    let audio = &given["audio"];
    let mut tensors = BTreeMap::new();
    let start = Instant::now();
    match kind.as_str() {
        "encodec" => {
            let model = Encodec::load(path, &device)?;
            println!("load_s {:.3}", start.elapsed().as_secs_f64());
            tensors.insert("latents".into(), faster_of_two("encode_s", || model.encode(audio))?);
            let n = given["codes"].dim(1)?;
            tensors.insert("codes".into(), model.quantize(&given["latents"], n)?);
            let decode = || model.decode_codes(&given["codes"]);
            tensors.insert("decoded".into(), faster_of_two("decode_s", decode)?);
        }
        "dac" => {
            let model = Dac::load(path, &device)?;
            println!("load_s {:.3}", start.elapsed().as_secs_f64());
            tensors.insert("latents".into(), faster_of_two("encode_s", || model.encode(audio))?);
            let n = given["codes"].dim(1)?;
            tensors.insert("codes".into(), model.quantize(&given["latents"], n)?);
            let decode = || model.decode(&model.dequantize(&given["codes"])?);
            tensors.insert("decoded".into(), faster_of_two("decode_s", decode)?);
        }
        "vggish" => {
            let model = Vggish::load(path, &device)?;
            println!("load_s {:.3}", start.elapsed().as_secs_f64());
            let audio = audio.to_vec1::<f32>()?;
            let log_mel = model.log_mel(&audio);
            let n = log_mel.len() / 64;
            tensors.insert("log_mel".into(), Tensor::from_vec(log_mel, (n, 64), &device)?);
            let embed = || {
                let rows = model.embed_clip(&audio, &Setting::Frames).map_err(candle_core::Error::wrap)?;
                Tensor::from_vec(rows.data, (rows.n, DIM), &device)
            };
            tensors.insert("embeddings".into(), faster_of_two("embed_s", embed)?);
        }
        other => return Err(format!("expected encodec, dac or vggish, found {other}").into()),
    }
    if let Some(song) = given.get("song") {
        let codec = Codec::load(path, &device)?;
        let Embeddings { n, dim, data } = codec.embed_clip(&song.to_vec1::<f32>()?, &Setting::Frames)?;
        tensors.insert("rows".into(), Tensor::from_vec(data, (n, dim), &device)?);
    }
    println!("peak_mib {:.0}", dragon_nn::peak_mib().unwrap_or(0.0));
    Ok(dragon_nn::write_safetensors(out, &tensors, &BTreeMap::new())?)
}

/// What `run` gives; prints the seconds of the faster of two passes: the first finds memory and threads cold.
fn faster_of_two(
    name: &str,
    run: impl Fn() -> candle_core::Result<Tensor>,
) -> Result<Tensor, candle_core::Error> {
    let mut fastest = f64::INFINITY;
    let mut last = None;
    for _ in 0..2 {
        let start = Instant::now();
        last = Some(run()?);
        fastest = fastest.min(start.elapsed().as_secs_f64());
    }
    println!("{name} {fastest:.3}");
    Ok(last.expect("two passes were made"))
}
