//! What a reward sees of a song.

use dragon_dist::Collective;
use dragon_metrics::Rows;

use crate::{Error, Result};

/// One encoder's view of a song.
#[derive(Debug, Clone, PartialEq)]
pub struct View {
    /// Embeddings of the song's windows, `[n, D]`.
    pub embeddings: Rows,
    /// Embedding of the song's own prompt in the same space, `[D]`; needed by the CLAP score only.
    pub text: Option<Vec<f64>>,
}

/// A song: one [`View`] for each [`crate::Source`] of the reward, in the order of [`crate::RewardSet::sources`].
#[derive(Debug, Clone, PartialEq)]
pub struct Song {
    /// The views; a reward reads the one in its slot.
    pub views: Vec<View>,
}

impl Song {
    /// A song with one view and no text.
    pub fn new(embeddings: Rows) -> Self {
        Self { views: vec![View { embeddings, text: None }] }
    }

    /// A song with one view and the embedding of its prompt.
    pub fn with_text(embeddings: Rows, text: Vec<f64>) -> Self {
        Self { views: vec![View { embeddings, text: Some(text) }] }
    }

    /// The view in `slot`.
    ///
    /// # Errors
    /// If the song does not carry it.
    pub fn view(&self, slot: usize) -> Result<&View> {
        self.views.get(slot).ok_or(Error::MissingView { slot, found: self.views.len() })
    }
}

/// Everybody's songs in rank order, so that all ranks see one global set.
///
/// # Errors
/// If the exchange fails or a rank sends something else.
pub fn gather_songs(group: &dyn Collective, songs: &[Song]) -> Result<Vec<Song>> {
    let mut bytes = Vec::new();
    let count = |bytes: &mut Vec<u8>, n: usize| bytes.extend_from_slice(&(n as u64).to_le_bytes());
    count(&mut bytes, songs.len());
    for song in songs {
        count(&mut bytes, song.views.len());
        for view in &song.views {
            count(&mut bytes, view.embeddings.n());
            count(&mut bytes, view.embeddings.dim());
            count(&mut bytes, view.text.as_ref().map_or(0, Vec::len));
            for x in view.embeddings.data().iter().chain(view.text.iter().flatten()) {
                bytes.extend_from_slice(&x.to_le_bytes());
            }
        }
    }
    let parts = group.all_gather_bytes(&bytes).map_err(|e| Error::Exchange(e.to_string()))?;
    let mut all = Vec::new();
    for part in &parts {
        let mut reader = Reader(part);
        for _ in 0..reader.count()? {
            let mut views = Vec::new();
            for _ in 0..reader.count()? {
                let (n, dim, text) = (reader.count()?, reader.count()?, reader.count()?);
                let size = n.checked_mul(dim).ok_or_else(Reader::cut_short)?;
                let embeddings = Rows::new(n, dim, reader.values(size)?)?;
                let text = if text == 0 { None } else { Some(reader.values(text)?) };
                views.push(View { embeddings, text });
            }
            all.push(Song { views });
        }
    }
    Ok(all)
}

/// Reads what [`gather_songs`] wrote.
struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn cut_short() -> Error {
        Error::Exchange("a rank sent fewer bytes than its counts announce".into())
    }

    fn word(&mut self) -> Result<[u8; 8]> {
        let (head, tail) = self.0.split_first_chunk::<8>().ok_or_else(Self::cut_short)?;
        self.0 = tail;
        Ok(*head)
    }

    fn count(&mut self) -> Result<usize> {
        Ok(u64::from_le_bytes(self.word()?) as usize)
    }

    fn values(&mut self, n: usize) -> Result<Vec<f64>> {
        if n > self.0.len() / 8 {
            return Err(Self::cut_short());
        }
        (0..n).map(|_| Ok(f64::from_le_bytes(self.word()?))).collect()
    }
}
