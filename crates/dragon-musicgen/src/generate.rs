//! From text states to codes: classifier-free guidance, and the choice of each code.

use std::ops::ControlFlow;

use candle_core::{DType, Device, Result, Tensor};
use dragon_nn::Rng;

use crate::decoder::{MusicGen, Texts};

/// How a code is chosen from its logits.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Choice {
    /// The likeliest; the first of equals.
    Greedy,
    /// Drawn from the softmax of `logits / temperature` over the `k` likeliest.
    TopK {
        /// How many.
        k: usize,
        /// Above 1 evens the probabilities out, below 1 sharpens them.
        temperature: f64,
    },
}

/// How codes are written.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Strength of classifier-free guidance, on the logits; 1: none.
    pub guidance_scale: f64,
    /// How a code is chosen.
    pub choice: Choice,
}

/// Writes a piece for each text: codes `[B, num_codebooks, n_frames]` u32, on the CPU; `None` if `on_step` ended the run.
///
/// Text `i` draws from `rngs[i]` alone, once per code: its piece does not depend on the others. `on_step` is told the number
/// of steps done, before each.
///
/// # Errors
/// If there are no frames or more than the model can be asked for, the number of generators is not that of the texts, or the
/// logits are not finite.
pub fn generate(
    model: &MusicGen,
    texts: &Texts,
    n_frames: usize,
    sampling: &Sampling,
    rngs: &mut [Rng],
    on_step: &mut dyn FnMut(usize) -> ControlFlow<()>,
) -> Result<Option<Tensor>> {
    let config = model.config();
    let n = texts.n_tokens.len();
    if n_frames == 0 || rngs.len() != n {
        candle_core::bail!("musicgen: {n_frames} frames, {n} texts and {} generators", rngs.len())
    }
    let delay = config.delay(n_frames);
    let guided = sampling.guidance_scale != 1.0;
    let mut state = model.start(texts, guided, delay.n_steps())?;
    let mut codes = vec![vec![vec![0u32; n_frames]; config.num_codebooks]; n];
    for step in 0..delay.n_steps() {
        if on_step(step).is_break() {
            return Ok(None);
        }
        let read = |piece: &Vec<Vec<u32>>| -> Vec<u32> {
            let code = |(k, codes): (usize, &Vec<u32>)| {
                delay.frame(k, step).map_or(config.padding(), |frame| codes[frame])
            };
            piece.iter().enumerate().map(code).collect()
        };
        let mut ids: Vec<u32> = codes.iter().flat_map(read).collect();
        if guided {
            ids.extend_from_within(..);
        }
        let shape = (state.batch(), config.num_codebooks, 1);
        let logits = model.forward(&Tensor::from_vec(ids, shape, model.device())?, &mut state)?; // [B, K, 1, V]
        let logits = logits.squeeze(2)?.to_dtype(DType::F32)?.to_device(&Device::Cpu)?;
        let logits: Vec<Vec<Vec<f32>>> = logits.to_vec3()?;
        for (i, (piece, rng)) in codes.iter_mut().zip(rngs.iter_mut()).enumerate() {
            for (k, codes) in piece.iter_mut().enumerate() {
                let Some(frame) = delay.frame(k, step + 1) else { continue };
                let with_text = &logits[i][k];
                codes[frame] = if guided {
                    let without = &logits[n + i][k];
                    choose(&guide(with_text, without, sampling.guidance_scale as f32), sampling.choice, rng)?
                } else {
                    choose(with_text, sampling.choice, rng)?
                };
            }
        }
    }
    let flat: Vec<u32> = codes.into_iter().flatten().flatten().collect();
    Ok(Some(Tensor::from_vec(flat, (n, config.num_codebooks, n_frames), &Device::Cpu)?))
}

/// `without + scale (with_text - without)`.
fn guide(with_text: &[f32], without: &[f32], scale: f32) -> Vec<f32> {
    with_text.iter().zip(without).map(|(w, o)| o + (w - o) * scale).collect()
}

/// Chooses a code.
fn choose(logits: &[f32], choice: Choice, rng: &mut Rng) -> Result<u32> {
    if let Some(bad) = logits.iter().find(|x| !x.is_finite()) {
        candle_core::bail!("musicgen: a logit is {bad}; are the weights damaged?")
    }
    let likeliest_first = |a: &usize, b: &usize| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b));
    let mut ids: Vec<usize> = (0..logits.len()).collect();
    let Choice::TopK { k, temperature } = choice else {
        let best = ids.into_iter().min_by(likeliest_first);
        return Ok(best.expect("a codebook has codes") as u32);
    };
    let k = k.clamp(1, ids.len());
    ids.select_nth_unstable_by(k - 1, likeliest_first);
    ids.truncate(k);
    ids.sort_unstable_by(likeliest_first);
    let most = f64::from(logits[ids[0]]);
    let weights: Vec<f64> =
        ids.iter().map(|&id| ((f64::from(logits[id]) - most) / temperature).exp()).collect();
    let mut rest = rng.uniform() * weights.iter().sum::<f64>();
    for (&id, weight) in ids.iter().zip(&weights) {
        rest -= weight;
        if rest < 0.0 {
            return Ok(id as u32);
        }
    }
    Ok(ids[0] as u32) // rounding left a rest: the draw was at the very end
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Config;
    use candle_nn::VarBuilder;
    use dragon_nn::Params;

    const CPU: Device = Device::Cpu;
    const SAMPLED: Sampling =
        Sampling { guidance_scale: 3.0, choice: Choice::TopK { k: 5, temperature: 1.0 } };

    fn model() -> MusicGen {
        let params = Params::new(4);
        let vb: VarBuilder = params.builder(DType::F32, &CPU);
        MusicGen::new(&Config::tiny(), 6, vb).unwrap()
    }

    fn texts(n_tokens: &[usize]) -> Texts {
        let longest = n_tokens.iter().copied().max().unwrap();
        // A text's states depend on the text alone; behind them lies whatever a longer one brings.
        let rows = n_tokens.iter().map(|&n| {
            let own = Rng::from_key("text", n as u64).normal_tensor((1, n, 6), DType::F32, &CPU).unwrap();
            let behind = Tensor::full(7f32, (1, longest - n, 6), &CPU).unwrap();
            if n < longest { Tensor::cat(&[own, behind], 1).unwrap() } else { own }
        });
        let states = Tensor::cat(&rows.collect::<Vec<_>>(), 0).unwrap();
        Texts { states, n_tokens: n_tokens.to_vec() }
    }

    fn codes(texts: &Texts, seeds: &[u64], sampling: &Sampling) -> Vec<Vec<Vec<u32>>> {
        let mut rngs: Vec<Rng> = seeds.iter().map(|&seed| Rng::new(seed)).collect();
        let go_on = &mut |_| ControlFlow::Continue(());
        generate(&model(), texts, 9, sampling, &mut rngs, go_on).unwrap().unwrap().to_vec3().unwrap()
    }

    #[test]
    fn a_piece_does_not_depend_on_its_batch() {
        for choice in [Choice::Greedy, SAMPLED.choice] {
            let sampling = Sampling { choice, ..SAMPLED };
            let all = codes(&texts(&[3, 5, 1]), &[10, 11, 12], &sampling);
            let one = codes(&texts(&[5]), &[11], &sampling);
            assert_eq!(all[1], one[0]);
            let two = codes(&texts(&[1, 3]), &[12, 10], &sampling);
            assert_eq!((&two[0], &two[1]), (&all[2], &all[0]));
        }
    }

    #[test]
    fn seeds_texts_and_guidance_matter() {
        let base = codes(&texts(&[3]), &[1], &SAMPLED);
        assert_eq!(base, codes(&texts(&[3]), &[1], &SAMPLED));
        assert_ne!(base, codes(&texts(&[3]), &[2], &SAMPLED));
        assert_ne!(base, codes(&texts(&[4]), &[1], &SAMPLED));
        assert_ne!(base, codes(&texts(&[3]), &[1], &Sampling { guidance_scale: 1.0, ..SAMPLED }));
    }

    #[test]
    fn greedy_codes_are_those_of_one_reading_of_the_whole_piece() {
        let (model, texts) = (model(), texts(&[4]));
        let sampling = Sampling { guidance_scale: 1.0, choice: Choice::Greedy };
        let written = codes(&texts, &[0], &sampling).remove(0);
        let delay = model.config().delay(9);
        let delayed: Vec<u32> = delay.delayed(&written, model.config().padding()).concat();
        let read = Tensor::from_vec(delayed, (1, 4, delay.n_steps() + 1), &CPU).unwrap();
        let mut state = model.start(&texts, false, delay.n_steps()).unwrap();
        let logits = model.forward(&read.narrow(2, 0, delay.n_steps()).unwrap(), &mut state).unwrap();
        let best: Vec<Vec<u32>> = logits.argmax(3).unwrap().get(0).unwrap().to_vec2().unwrap(); // [K, T]
        for (k, row) in best.iter().enumerate() {
            for (step, &code) in row.iter().enumerate() {
                if let Some(frame) = delay.frame(k, step + 1) {
                    assert_eq!(code, written[k][frame], "codebook {k}, frame {frame}");
                }
            }
        }
    }

    #[test]
    fn draws_follow_the_softmax_of_the_likeliest() {
        let logits = [0.0f32, 2.0, -1.0, 1.0];
        let mut rng = Rng::new(8);
        let n = 40_000;
        let mut counts = [0usize; 4];
        for _ in 0..n {
            let choice = Choice::TopK { k: 3, temperature: 2.0 };
            counts[choose(&logits, choice, &mut rng).unwrap() as usize] += 1;
        }
        let weights = [0.0f64, 1.0, 0.0, 0.5].map(|x| x.exp()); // exp(logit / 2); the third is never drawn
        let total = weights[0] + weights[1] + weights[3];
        for (i, &count) in counts.iter().enumerate() {
            let want = if i == 2 { 0.0 } else { weights[i] / total };
            assert!((count as f64 / n as f64 - want).abs() < 0.01, "{i}: {count}");
        }
        let one = Choice::TopK { k: 1, temperature: 1.0 };
        assert_eq!(choose(&logits, one, &mut rng).unwrap(), 1);
        assert_eq!(choose(&[3.0, 3.0], Choice::Greedy, &mut rng).unwrap(), 0);
        assert_eq!(choose(&[0.0, 9.0], Choice::TopK { k: 99, temperature: 1e-3 }, &mut rng).unwrap(), 1);
        assert!(choose(&[0.0, f32::NAN], one, &mut rng).is_err());
    }

    #[test]
    fn a_run_can_be_ended() {
        let mut steps = vec![];
        let mut on_step = |step| {
            steps.push(step);
            if step == 2 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        let got = generate(&model(), &texts(&[2]), 9, &SAMPLED, &mut [Rng::new(0)], &mut on_step).unwrap();
        assert!(got.is_none());
        assert_eq!(steps, [0, 1, 2]);
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let go_on = &mut |_| ControlFlow::Continue(());
        let mut fails = |n_frames: usize, texts: &Texts, n_rngs: usize| {
            let mut rngs = vec![Rng::new(0); n_rngs];
            generate(&model(), texts, n_frames, &SAMPLED, &mut rngs, go_on).unwrap_err().to_string()
        };
        let one = texts(&[2]);
        assert!(fails(0, &one, 1).contains("0 frames"));
        assert!(fails(3, &one, 2).contains("2 generators"));
        assert!(fails(62, &one, 1).contains("65 steps, the model has 64"));
        assert!(fails(3, &Texts { n_tokens: vec![3], ..one }, 1).contains("do not fit states"));
        let (model, one) = (model(), texts(&[2]));
        let mut state = model.start(&one, false, 2).unwrap();
        let read = |shape: (usize, usize, usize)| Tensor::zeros(shape, DType::U32, &CPU).unwrap();
        for shape in [(2, 4, 1), (1, 3, 1), (1, 4, 3)] {
            assert!(model.forward(&read(shape), &mut state).is_err(), "{shape:?}");
        }
        let above = Tensor::full(12u32, (1, 4, 1), &CPU).unwrap();
        assert!(model.forward(&above, &mut state).is_err());
    }
}
