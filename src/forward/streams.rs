//! What is done with several streams side by side.

use kernels::Forward;
use ndarray::Array2;

use super::run::{Read, Run};
use crate::error::Result;
use crate::graph::LEAST;
use crate::program::Streams;

impl<'b, B: Forward> Run<'_, 'b, B> {
    /// Does one of these operations, of streams of `width` values, to what it reads.
    pub fn streams(&self, at: usize, width: usize, what: &Streams<'b>, reads: Vec<Read<'_, B>>) -> Result<B::Matrix> {
        let backend = self.backend;
        let mut reads = reads.into_iter();
        let mut next = || reads.next().expect("as many as it reads");
        Ok(match what {
            Streams::Take(index) => {
                let h = next();
                let count = self.count(h.matrix(), width);
                self.of_all(h.matrix(), &one_hot(*index, count), width)?
            }
            Streams::Mean => {
                let h = next();
                let count = self.count(h.matrix(), width);
                self.of_all(h.matrix(), &vec![1.0 / count as f32; count], width)?
            }
            Streams::Match => {
                let mut h = self.own(next())?;
                backend.match_streams(&mut h, width, LEAST)?;
                h
            }
            Streams::Tanh => {
                let mut x = self.own(next())?;
                backend.softcap(&mut x, 1.0)?;
                x
            }
            Streams::Predict => {
                let (mut h, x, coefficients) = (self.own(next())?, next(), next());
                backend.mix_streams(x.matrix(), coefficients.matrix(), width, &mut h)?;
                h
            }
            Streams::Correct => {
                let (mut h, x, coefficients) = (self.own(next())?, next(), next());
                backend.mix_streams(x.matrix(), coefficients.matrix(), width, &mut h)?;
                let ones = vec![1.0; self.count(&h, width)];
                self.add_to(&mut h, x.matrix(), &ones, width)?;
                h
            }
            Streams::Others => {
                let (mut h, x) = (self.own(next())?, next());
                let mut shares = vec![1.0; self.count(&h, width)];
                shares[0] = 0.0;
                self.add_to(&mut h, x.matrix(), &shares, width)?;
                h
            }
            Streams::Each => {
                let (x, shares) = (next(), next());
                let [tokens, count] = backend.shape(shares.matrix());
                let mut y = backend.zeros(tokens, count * width)?;
                backend.mix_streams(x.matrix(), shares.matrix(), width, &mut y)?;
                y
            }
            Streams::Join(share) => {
                let mut sum = self.own(next())?;
                for x in reads {
                    backend.add_scaled(x.matrix(), 1.0, &mut sum)?;
                }
                if *share != 1.0 {
                    backend.scale(&mut sum, &[], &vec![*share; width])?;
                }
                sum
            }
            Streams::Times(_) => {
                let mut x = self.own(next())?;
                backend.scale(&mut x, &[], self.vector(at).unwrap_or_default())?;
                x
            }
        })
    }

    fn count(&self, h: &B::Matrix, width: usize) -> usize {
        self.backend.shape(h)[1] / width
    }

    /// One stream of all, with the same shares for every token.
    fn of_all(&self, h: &B::Matrix, shares: &[f32], width: usize) -> Result<B::Matrix> {
        let [tokens, _] = self.backend.shape(h);
        let mut y = self.backend.zeros(tokens, width)?;
        self.backend.mix_streams(h, &self.alike(tokens, shares)?, width, &mut y)?;
        Ok(y)
    }

    /// Adds a value to every stream, times a share for each.
    fn add_to(&self, h: &mut B::Matrix, x: &B::Matrix, shares: &[f32], width: usize) -> Result<()> {
        let [tokens, _] = self.backend.shape(h);
        Ok(self.backend.mix_streams(x, &self.alike(tokens, shares)?, width, h)?)
    }

    /// The same coefficients for so many tokens.
    fn alike(&self, tokens: usize, shares: &[f32]) -> Result<B::Matrix> {
        let all = Array2::from_shape_fn((tokens, shares.len()), |(_, index)| shares[index]);
        Ok(self.backend.upload(all)?)
    }
}

/// All of one stream and nothing of others.
fn one_hot(index: usize, count: usize) -> Vec<f32> {
    (0..count).map(|other| if other == index { 1.0 } else { 0.0 }).collect()
}
