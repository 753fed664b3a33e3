//! The packages of recorded music and the tracks in them.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};

use super::packages::walk;
use crate::error::{Error, Result};
use crate::rng::sha256_hex;
use crate::store::slug;

/// A package of recorded music.
#[derive(Debug)]
pub(super) struct Package {
    pub name: &'static str,
    /// Part of the path that tells music from effects.
    pub folder: &'static str,
    /// Licence as the package declares it.
    pub licence: &'static str,
    /// Style words for captions.
    pub styles: &'static [&'static str],
}

/// Five packages, five styles that can be told apart.
pub(super) const PACKAGES: [Package; 5] = [
    Package {
        name: "wesnoth-1.16-music",
        folder: "/music/",
        licence: "GPL-2+",
        styles: &["orchestral", "symphonic", "orchestral fantasy", "cinematic orchestral"],
    },
    Package {
        name: "singularity-music",
        folder: "/music/",
        licence: "CC-BY-SA-3.0",
        styles: &["ambient electronic", "electronic", "ambient synthesizer", "science-fiction electronic"],
    },
    Package {
        name: "marsshooter-data",
        folder: "/audio/",
        licence: "CC-BY-SA-3.0",
        styles: &["metal", "female-fronted metal", "metal band", "heavy metal"],
    },
    Package {
        name: "supertux-data",
        folder: "/music/",
        licence: "GPL-2+",
        styles: &["video game", "platform game", "game level", "platform game"],
    },
    Package {
        name: "nexuiz-music",
        folder: "/cdtracks/",
        licence: "GPL-2+",
        styles: &["electronic", "techno", "electronic shooter game", "electronic dance"],
    },
];

/// Tracks left out, with the reason.
const EXCLUDED: [(&str, &str, &str); 2] = [
    ("supertux-data", "greatgigantic", "based on the theme of a commercial game"),
    ("singularity-music", "March Thee to Dis", "the same recording as Advanced Simulacra"),
];

/// Tracks that are versions of one composition, and the name they share as a piece, so that no split divides them.
const RELATED: [(&str, &str, &str); 13] = [
    ("supertux-data", "cave_old", "cave"),
    ("supertux-data", "fortress_old", "fortress"),
    ("supertux-data", "airship_2", "airship"),
    ("supertux-data", "airship_remix", "airship"),
    ("supertux-data", "beneath_the_rabbit_hole", "rabbit-holes"),
    ("supertux-data", "forest2", "rabbit-holes"),
    ("supertux-data", "ghostforest2", "ghostforest"),
    ("supertux-data", "ghostforest_map", "ghostforest"),
    ("supertux-data", "voc-daytime", "voc"),
    ("supertux-data", "voc-daytime2", "voc"),
    ("supertux-data", "voc-night", "voc"),
    ("nexuiz-music", "sixtyfour_", "sixtyfour"),
    ("nexuiz-music", "sixtyfour_revisited", "sixtyfour"),
];

/// A track and what its package says about it.
#[derive(Debug)]
pub(super) struct Track {
    pub package: &'static Package,
    /// File.
    pub path: PathBuf,
    /// Unique name: package and file stem.
    pub id: String,
    /// Name that decides the split.
    pub piece: String,
    /// Folder the file lies in, such as "forest".
    pub world: String,
    pub tags: BTreeMap<String, String>,
    pub sha256: String,
}

/// Why a track is left out, if it is.
pub(super) fn is_excluded(track: &Track) -> Option<&'static str> {
    let stem = track.path.file_stem().unwrap_or_default().to_string_lossy();
    EXCLUDED.iter().find(|(p, s, _)| *p == track.package.name && *s == stem).map(|(_, _, reason)| *reason)
}

/// The music files of an unpacked package, sorted.
pub(super) fn find_tracks(package: &'static Package, folder: &Path) -> Result<Vec<Track>> {
    for pk3 in walk(folder)?.iter().filter(|p| p.extension().is_some_and(|e| e == "pk3")) {
        unzip_tracks(pk3)?;
    }
    let mut files: Vec<PathBuf> = walk(folder)?
        .into_iter()
        .filter(|p| p.extension().is_some_and(|e| e == "ogg") && p.to_string_lossy().contains(package.folder))
        .collect();
    files.sort();
    let mut seen = HashSet::new();
    let mut tracks = Vec::new();
    for path in files {
        let bytes = fs::read(&path).map_err(Error::io(&path, "read"))?;
        let sha256 = sha256_hex(&bytes);
        if !seen.insert(sha256.clone()) {
            continue; // the same file twice
        }
        let stem = path.file_stem().unwrap_or_default().to_string_lossy().to_string();
        let related =
            RELATED.iter().find(|(p, s, _)| *p == package.name && *s == stem).map(|(_, _, shared)| *shared);
        let mut tags = BTreeMap::new();
        for (key, value) in dragon_audio::read_tags(&path).unwrap_or_default() {
            if !value.trim().is_empty() {
                tags.entry(key).or_insert(value.trim().to_string());
            }
        }
        let world = path.parent().and_then(Path::file_name).unwrap_or_default().to_string_lossy().to_string();
        tracks.push(Track {
            package,
            id: format!("{}-{}", package.name.replace('.', "_"), slug(&stem)),
            piece: format!("{}/{}", package.name, related.map_or_else(|| slug(&stem), str::to_string)),
            path,
            world,
            tags,
            sha256,
        });
    }
    if tracks.is_empty() {
        return Err(Error::Nothing {
            what: "tracks",
            path: folder.to_path_buf(),
            detail: format!("no *.ogg below `{}`", package.folder),
        });
    }
    Ok(tracks)
}

/// Unzips the Ogg files of a game archive beside it.
fn unzip_tracks(archive: &Path) -> Result<()> {
    let damaged = |detail: String| Error::Input { what: "archive", path: archive.to_path_buf(), detail };
    let file = fs::File::open(archive).map_err(Error::io(archive, "read"))?;
    let mut zip = zip::ZipArchive::new(file).map_err(|e| damaged(e.to_string()))?;
    for i in 0..zip.len() {
        let mut member = zip.by_index(i).map_err(|e| damaged(e.to_string()))?;
        let Some(inside) = member.enclosed_name().filter(|n| n.extension().is_some_and(|e| e == "ogg"))
        else {
            continue;
        };
        let to = archive.with_extension("").join(inside);
        if to.exists() {
            continue;
        }
        let parent = to.parent().unwrap_or(archive);
        fs::create_dir_all(parent).map_err(Error::io(parent, "created"))?;
        let mut bytes = Vec::new();
        std::io::Read::read_to_end(&mut member, &mut bytes).map_err(Error::io(archive, "read"))?;
        dragon_audio::write::write_atomic(&to, &bytes).map_err(Error::io(&to, "written"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn archives_cannot_write_outside_their_folder() {
        use std::io::Write;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("music.pk3");
        let mut zip = zip::ZipWriter::new(fs::File::create(&path).unwrap());
        let options = zip::write::SimpleFileOptions::default();
        for name in ["sound/cdtracks/a.ogg", "../evil.ogg", "sound/readme.txt"] {
            zip.start_file(name, options).unwrap();
            zip.write_all(b"OggS").unwrap();
        }
        zip.finish().unwrap();
        unzip_tracks(&path).unwrap();
        assert!(dir.path().join("music/sound/cdtracks/a.ogg").exists());
        assert_eq!(walk(dir.path()).unwrap().len(), 2, "the archive and one track");
    }
}
