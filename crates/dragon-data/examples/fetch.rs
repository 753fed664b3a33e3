//! Fetches corpus "recordings": `fetch CACHE OUT N_CLIPS SEED`.

use std::sync::atomic::AtomicBool;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [cache, out, n_clips, seed] = args.as_slice() else {
        return Err("usage: fetch CACHE OUT N_CLIPS SEED".into());
    };
    let options = dragon_data::fetch::Options {
        cache: cache.into(),
        out: out.into(),
        n_clips: n_clips.parse()?,
        seed: seed.parse()?,
    };
    println!("{:#?}", dragon_data::fetch::score_inputs(&options.cache)?);
    println!("{:#?}", dragon_data::fetch::recordings(&options, &AtomicBool::new(false))?);
    Ok(())
}
