//! The delay pattern (MusicGen, section 2.2): codebook `k` of a frame is written `k` steps after codebook 0, so that each sees
//! those before it although a step writes one code of every codebook.
//!
//! ```text
//! position       0  1  2  3  4  5      (4 codebooks, 2 frames; P: the padding code)
//! codebook 0     P  0  1  P  P  P
//! codebook 1     P  P  0  1  P  P
//! codebook 2     P  P  P  0  1  P
//! codebook 3     P  P  P  P  0  1
//! ```
//!
//! Step `s` reads position `s` and writes position `s + 1`.

/// The pattern of a piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Delay {
    /// Codebooks.
    pub n_codebooks: usize,
    /// Frames of the piece.
    pub n_frames: usize,
}

impl Delay {
    /// Steps until every code is written.
    pub fn n_steps(&self) -> usize {
        self.n_frames + self.n_codebooks - 1
    }

    /// The frame whose code a codebook has at a position; none where it has padding.
    pub fn frame(&self, codebook: usize, position: usize) -> Option<usize> {
        position.checked_sub(codebook + 1).filter(|&frame| frame < self.n_frames)
    }

    /// Codes `[n_codebooks][n_frames]` as positions `[n_codebooks][n_steps + 1]`.
    pub fn delayed(&self, codes: &[Vec<u32>], padding: u32) -> Vec<Vec<u32>> {
        let positions = |(k, codes): (usize, &Vec<u32>)| {
            (0..=self.n_steps()).map(|p| self.frame(k, p).map_or(padding, |frame| codes[frame])).collect()
        };
        codes.iter().enumerate().map(positions).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_shifted_by_their_codebook() {
        let delay = Delay { n_codebooks: 3, n_frames: 2 };
        assert_eq!(delay.n_steps(), 4);
        let codes = [vec![1, 2], vec![3, 4], vec![5, 6]];
        let got = delay.delayed(&codes, 9);
        assert_eq!(got, [[9, 1, 2, 9, 9], [9, 9, 3, 4, 9], [9, 9, 9, 5, 6]]);
    }

    #[test]
    fn every_code_has_one_position_and_comes_back() {
        let delay = Delay { n_codebooks: 4, n_frames: 7 };
        let code = |k: usize, frame: usize| (10 * k + frame) as u32;
        let codes: Vec<Vec<u32>> = (0..4).map(|k| (0..7).map(|frame| code(k, frame)).collect()).collect();
        let mut back = vec![vec![u32::MAX; 7]; 4];
        for (k, row) in delay.delayed(&codes, 99).iter().enumerate() {
            for (position, &code) in row.iter().enumerate() {
                match delay.frame(k, position) {
                    Some(frame) => back[k][frame] = code,
                    None => assert_eq!(code, 99),
                }
            }
        }
        assert_eq!(back, codes);
    }
}
