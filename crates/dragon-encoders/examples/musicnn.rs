//! What musicnn hears in audio files, and how long it takes.
//!
//! `cargo run --release -p dragon-encoders --example musicnn -- fixtures/musicnn/mtt_musicnn.safetensors fixtures/music/*.ogg`
//!
//! Prints per file the likeliest tags; then the time of the nine embeddings of a 5.12 s clip, on one thread and on all.

use std::path::Path;
use std::time::Instant;

use dragon_encoders::musicnn::{Musicnn, SAMPLE_RATE_HZ};
use dragon_encoders::{AudioEncoder, Setting, Tail};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let weights = args.next().ok_or("usage: musicnn WEIGHTS.safetensors FILE...")?;
    let model = Musicnn::load(weights)?;
    let mut clips: Vec<Vec<f32>> = Vec::new();
    for path in args {
        let clip = dragon_audio::read_mono(Path::new(&path), SAMPLE_RATE_HZ)?;
        let tags: Vec<String> =
            model.tag_clip(&clip.samples)?[..5].iter().map(|(name, p)| format!("{name} {p:.2}")).collect();
        println!("{path}: {}", tags.join(", "));
        if clip.samples.len() >= 81920 {
            clips.push(clip.samples[..81920].to_vec());
        }
    }
    if clips.is_empty() {
        return Ok(());
    }

    let setting = Setting::Fadtk { hop_s: 0.256, tail: Tail::WholeWindows };
    let batch: Vec<&[f32]> = clips.iter().map(Vec::as_slice).cycle().take(16).collect();
    let best = |clips: &[&[f32]]| -> dragon_encoders::Result<f64> {
        let mut best = f64::INFINITY;
        for _ in 0..10 {
            let start = Instant::now();
            model.embed_clips(clips, &setting)?;
            best = best.min(start.elapsed().as_secs_f64());
        }
        Ok(best * 1e3)
    };
    let n = model.embed_clip(batch[0], &setting)?.n;
    println!(
        "{} on clips of 5.12 s, {n} windows each: one clip {:.1} ms, {} clips {:.1} ms each on {} threads (best of 10)",
        model.id(),
        best(&batch[..1])?,
        batch.len(),
        best(&batch)? / batch.len() as f64,
        rayon::current_num_threads(),
    );
    Ok(())
}
