//! Our side of `cargo xtask bench --peers`: runs named cases on request, so that the script can alternate with
//! PyTorch in one go.
//!
//! Reads lines `CASE SECONDS` from standard input and answers each with `CASE BEST_SECONDS PEAK_MIB`: the shortest of
//! the runs that fit into that time (two at least), and the peak of the process's resident memory so far.

use candle_core::{DType, Device, Module, Result, Tensor};
use dragon_nn::{
    AdamW, AdamWConfig, Conv1d, Conv1dSpec, ConvTranspose1d, ConvTranspose1dSpec, Linear, Params, Rng, Snake,
    attention, conv_transpose1d, conv1d, layer_norm, linear, swiglu,
};
use std::io::{BufRead, Write};
use std::time::Instant;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const CPU: Device = Device::Cpu;

fn noise(key: &str, shape: &[usize]) -> Result<Tensor> {
    Rng::from_key(key, 0).normal_tensor(shape, DType::F32, &CPU)
}

fn var(key: &str, shape: &[usize]) -> Result<Tensor> {
    Ok(candle_core::Var::from_tensor(&(noise(key, shape)? * 0.05)?)?.into_inner())
}

type Case = Box<dyn FnMut() -> Result<()>>;

/// Times the forward pass on constants, or forward and backward on variables.
fn operation(
    backward: bool,
    shapes: &[&[usize]],
    f: impl Fn(&[Tensor]) -> Result<Tensor> + 'static,
) -> Result<Case> {
    let inputs: Vec<Tensor> = shapes
        .iter()
        .enumerate()
        .map(|(i, shape)| if backward { var(&i.to_string(), shape) } else { noise(&i.to_string(), shape) })
        .collect::<Result<_>>()?;
    Ok(Box::new(move || {
        let y = f(&inputs)?;
        if backward {
            // A sum's gradient is one number spread out; the product makes it a real tensor, as in training.
            dragon_nn::backward(&y.sqr()?.sum_all()?)?;
        }
        Ok(())
    }))
}

/// Pre-norm transformer block: attention and a gated feed-forward layer.
struct Block {
    q: Linear,
    k: Linear,
    v: Linear,
    out: Linear,
    up: Linear,
    down: Linear,
    heads: usize,
}

impl Block {
    fn new(width: usize, heads: usize, vb: candle_nn::VarBuilder) -> Result<Block> {
        let square = |name: &str| Linear::new(width, width, vb.pp(name));
        Ok(Block {
            q: square("q")?,
            k: square("k")?,
            v: square("v")?,
            out: square("out")?,
            up: Linear::new(width, 8 * width, vb.pp("up"))?,
            down: Linear::new(4 * width, width, vb.pp("down"))?,
            heads,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (b, t, c) = x.dims3()?;
        let h = layer_norm(x, None, None, 1e-5)?;
        let heads = |t_: Tensor| t_.reshape((b, t, self.heads, c / self.heads));
        let (q, k, v) =
            (heads(self.q.forward(&h)?)?, heads(self.k.forward(&h)?)?, heads(self.v.forward(&h)?)?);
        let h = attention(&q, &k, &v, None, 1.0 / ((c / self.heads) as f64).sqrt())?.reshape((b, t, c))?;
        let x = (x + self.out.forward(&h)?)?;
        let h = swiglu(&self.up.forward(&layer_norm(&x, None, None, 1e-5)?)?)?;
        x + self.down.forward(&h)?
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Pass {
    Forward,
    Backward,
    Step,
}

fn transformer(width: usize, depth: usize, heads: usize, batch: usize, pass: Pass) -> Result<Case> {
    let params = Params::new(0);
    let vb = params.builder(DType::F32, &CPU);
    let blocks: Vec<Block> = (0..depth).map(|i| Block::new(width, heads, vb.pp(i))).collect::<Result<_>>()?;
    let x = noise("x", &[batch, 80, width])?;
    let frozen = pass == Pass::Forward;
    let mut optimiser = AdamW::new(&params, AdamWConfig { max_grad_norm: Some(1.0), ..Default::default() })?;
    Ok(Box::new(move || {
        let mut h = x.clone();
        for block in &blocks {
            h = block.forward(&h)?;
            if frozen {
                h = h.detach();
            }
        }
        if frozen {
            return Ok(());
        }
        let grads = dragon_nn::backward(&h.sqr()?.mean_all()?)?;
        if pass == Pass::Step {
            optimiser.step(&grads)?;
        }
        Ok(())
    }))
}

/// Residual unit of an audio codec: snake, dilated convolution, snake, convolution of one tap.
struct Unit(Snake, Conv1d, Snake, Conv1d);

impl Unit {
    fn new(c: usize, dilation: usize, vb: candle_nn::VarBuilder) -> Result<Unit> {
        let spec = Conv1dSpec { padding: 3 * dilation, dilation, ..Default::default() };
        Ok(Unit(
            Snake::new(c, vb.pp(0))?,
            Conv1d::new(c, c, 7, spec, vb.pp(1))?,
            Snake::new(c, vb.pp(2))?,
            Conv1d::new(c, c, 1, Conv1dSpec::default(), vb.pp(3))?,
        ))
    }
}

impl Module for Unit {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        x + x.apply(&self.0)?.apply(&self.1)?.apply(&self.2)?.apply(&self.3)?
    }
}

const STRIDES: [usize; 4] = [4, 4, 8, 8];

fn codec(decode: bool, backward: bool) -> Result<Case> {
    let params = Params::new(0);
    let vb = params.builder(DType::F32, &CPU);
    let mut layers: Vec<Box<dyn Module>> = Vec::new();
    let near = Conv1dSpec { padding: 3, ..Default::default() };
    let widths: Vec<usize> = (0..=4).map(|i| 16 << i).collect();
    let x = if decode { noise("x", &[2, 40, 32])? } else { noise("x", &[2, 40960, 1])? };
    if decode {
        layers.push(Box::new(Conv1d::new(32, widths[4], 7, near, vb.pp("in"))?));
    } else {
        layers.push(Box::new(Conv1d::new(1, widths[0], 7, near, vb.pp("in"))?));
    }
    for i in 0..4 {
        let vb = vb.pp(i);
        let units = |c: usize, layers: &mut Vec<Box<dyn Module>>| -> Result<()> {
            for dilation in [1, 3, 9] {
                layers.push(Box::new(Unit::new(c, dilation, vb.pp(format!("u{dilation}")))?));
            }
            Ok(())
        };
        if decode {
            let (stride, c_in, c_out) = (STRIDES[3 - i], widths[4 - i], widths[3 - i]);
            layers.push(Box::new(Snake::new(c_in, vb.pp("s"))?));
            let spec = ConvTranspose1dSpec { stride, padding: stride / 2, ..Default::default() };
            layers.push(Box::new(ConvTranspose1d::new(c_in, c_out, 2 * stride, spec, vb.pp("c"))?));
            units(c_out, &mut layers)?;
        } else {
            let (stride, c_in, c_out) = (STRIDES[i], widths[i], widths[i + 1]);
            units(c_in, &mut layers)?;
            layers.push(Box::new(Snake::new(c_in, vb.pp("s"))?));
            let spec = Conv1dSpec { stride, padding: stride / 2, ..Default::default() };
            layers.push(Box::new(Conv1d::new(c_in, c_out, 2 * stride, spec, vb.pp("c"))?));
        }
    }
    if decode {
        layers.push(Box::new(Snake::new(widths[0], vb.pp("so"))?));
        layers.push(Box::new(Conv1d::new(widths[0], 1, 7, near, vb.pp("out"))?));
    } else {
        layers.push(Box::new(Conv1d::new(
            widths[4],
            64,
            3,
            Conv1dSpec { padding: 1, ..near },
            vb.pp("out"),
        )?));
    }
    Ok(Box::new(move || {
        let mut h = x.clone();
        for layer in &layers {
            h = layer.forward(&h)?;
            if !backward {
                h = h.detach();
            }
        }
        if backward {
            dragon_nn::backward(&h.sqr()?.mean_all()?)?;
        }
        Ok(())
    }))
}

fn case(name: &str) -> Result<Case> {
    let (kind, backward) = match name.strip_suffix("+bwd") {
        Some(kind) => (kind, true),
        None => (name, false),
    };
    let pass = if backward { Pass::Backward } else { Pass::Forward };
    let conv = |spec: Conv1dSpec, shapes: &[&[usize]]| {
        operation(backward, shapes, move |t| conv1d(&t[0], &t[1], Some(&t[2]), spec))
    };
    let plain = Conv1dSpec::default();
    match kind {
        "conv1d_64_k7" => conv(Conv1dSpec { padding: 3, ..plain }, &[&[4, 8192, 64], &[64, 64, 7], &[64]]),
        "conv1d_64_k7_d9" => {
            conv(Conv1dSpec { padding: 27, dilation: 9, ..plain }, &[&[4, 8192, 64], &[64, 64, 7], &[64]])
        }
        "conv1d_512_k7" => {
            conv(Conv1dSpec { padding: 3, ..plain }, &[&[4, 320, 512], &[512, 512, 7], &[512]])
        }
        "conv1d_16_k7" => conv(Conv1dSpec { padding: 3, ..plain }, &[&[2, 81920, 16], &[16, 16, 7], &[16]]),
        "conv1d_64_s4" => {
            conv(Conv1dSpec { stride: 4, padding: 2, ..plain }, &[&[4, 8192, 64], &[128, 64, 8], &[128]])
        }
        "conv_transpose1d_s4" => {
            let spec = ConvTranspose1dSpec { stride: 4, padding: 2, ..Default::default() };
            operation(backward, &[&[4, 2048, 128], &[128, 64, 8], &[64]], move |t| {
                conv_transpose1d(&t[0], &t[1], Some(&t[2]), spec)
            })
        }
        "conv_transpose1d_s8" => {
            let spec = ConvTranspose1dSpec { stride: 8, padding: 4, ..Default::default() };
            operation(backward, &[&[4, 80, 512], &[512, 256, 16], &[256]], move |t| {
                conv_transpose1d(&t[0], &t[1], Some(&t[2]), spec)
            })
        }
        "linear_512_2048" => {
            operation(backward, &[&[640, 512], &[2048, 512], &[2048]], |t| linear(&t[0], &t[1], Some(&t[2])))
        }
        "linear_192_768" => {
            operation(backward, &[&[1280, 192], &[768, 192], &[768]], |t| linear(&t[0], &t[1], Some(&t[2])))
        }
        "attention_80" => {
            operation(backward, &[&[16, 80, 6, 32][..]; 3], |t| attention(&t[0], &t[1], &t[2], None, 0.2))
        }
        "attention_1024" => {
            operation(backward, &[&[2, 1024, 8, 64][..]; 3], |t| attention(&t[0], &t[1], &t[2], None, 0.2))
        }
        "transformer_192x6" => transformer(192, 6, 6, 16, pass),
        "transformer_512x8" => transformer(512, 8, 8, 8, pass),
        "transformer_192x6_step" => transformer(192, 6, 6, 16, Pass::Step),
        "transformer_512x8_step" => transformer(512, 8, 8, 8, Pass::Step),
        "codec_encode" => codec(false, backward),
        "codec_decode" => codec(true, backward),
        _ => candle_core::bail!("no case `{name}`"),
    }
}

/// Peak resident memory of this process in MiB; 0 where the system does not tell.
fn peak_mib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).unwrap_or_default();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap_or(0) / 1024
}

fn main() -> Result<()> {
    for line in std::io::stdin().lock().lines() {
        let line = line.map_err(candle_core::Error::wrap)?;
        let mut words = line.split_whitespace();
        let (Some(name), Some(seconds)) = (words.next(), words.next().and_then(|s| s.parse::<f64>().ok()))
        else {
            candle_core::bail!("expected `CASE SECONDS`, got `{line}`")
        };
        let mut run = case(name)?;
        run()?;
        let (start, mut best, mut n_runs) = (Instant::now(), f64::INFINITY, 0);
        while n_runs < 2 || start.elapsed().as_secs_f64() < seconds {
            let begin = Instant::now();
            run()?;
            best = best.min(begin.elapsed().as_secs_f64());
            n_runs += 1;
        }
        println!("{name} {best} {}", peak_mib());
        std::io::stdout().flush().map_err(candle_core::Error::wrap)?;
    }
    Ok(())
}
