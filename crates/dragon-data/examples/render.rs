//! Renders a corpus of clips from a folder of ABC tunes: `render TUNES SOUNDFONT OUT N_CLIPS SEED`.

use std::sync::atomic::AtomicBool;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [tunes, soundfont, out, n_clips, seed] = args.as_slice() else {
        return Err("usage: render TUNES SOUNDFONT OUT N_CLIPS SEED".into());
    };
    let options = dragon_data::render::Options {
        tunes: tunes.into(),
        soundfont: soundfont.into(),
        out: out.into(),
        n_clips: n_clips.parse()?,
        seed: seed.parse()?,
    };
    println!("{:#?}", dragon_data::render::render(&options, &AtomicBool::new(false))?);
    Ok(())
}
