//! Scratch runner of the CLAP pre-training.
use candle_core::Device;
use dragon_data::Split;
use dragon_encoders::clap::ClapEncoder;
use dragon_trainer::pretrain::clap::{ClapConfig, ClapTask, Retrieval};
use dragon_trainer::pretrain::{LoopConfig, run};
use dragon_trainer::{Progress, RunContext};

#[derive(serde::Serialize)]
struct Config {
    seed: u64,
    run: LoopConfig,
    clap: ClapConfig,
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let steps: usize = args[2].parse().unwrap();
    let manifests: Vec<std::path::PathBuf> = args[5..].iter().map(Into::into).collect();
    let mut clap = ClapConfig::tiny_music(manifests.clone());
    clap.decay_steps = steps.max(200);
    for part in args[3].split(',').filter(|p| !p.is_empty()) {
        let (k, v) = part.split_once('=').unwrap();
        match k {
            "lr" => clap.optimizer.lr = v.parse().unwrap(),
            "wd" => clap.optimizer.weight_decay = v.parse().unwrap(),
            "batch" => clap.batch = v.parse().unwrap(),
            "augment" => clap.augment = v == "1",
            "ema" => clap.ema_decay = v.parse().unwrap(),
            "mlp" => clap.model.audio.mlp_ratio = v.parse().unwrap(),
            _ => panic!("{k}"),
        }
    }
    let every: usize = args[4].parse().unwrap();
    let loop_cfg = LoopConfig {
        steps,
        log_every: 25,
        validate_every: every,
        checkpoint_every: 1000,
        keep_checkpoints: 1,
    };
    let t = std::time::Instant::now();
    let mut task = ClapTask::new(&clap, 1, &Device::Cpu).unwrap();
    eprintln!("read in {:?}", t.elapsed());
    let mut ctx = RunContext::new(&args[1]);
    ctx.progress = Progress::Lines;
    ctx.resume = true;
    let config = Config { seed: 1, run: loop_cfg, clap };
    let out = run(&mut task, "pretrain clap", &config, &config.run, 1, &ctx).unwrap();
    let encoder = ClapEncoder::load(&out.model_dir, &Device::Cpu).unwrap();
    for m in manifests {
        let r = Retrieval::on_pieces(&encoder, &m, &[Split::Valid, Split::Test], 10000).unwrap();
        println!("{r:?}");
    }
}
