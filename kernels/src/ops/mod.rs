//! One file an operation: shapes, the plain-loop reference, the fast CPU form.

pub mod activation;
pub mod add;
pub mod apart;
pub mod attention;
pub mod beside;
pub mod bf16;
pub mod blocks;
pub mod convolve;
pub mod delta;
pub mod dequantize;
pub mod encoded;
pub mod factor;
pub mod fit;
pub mod gram;
pub mod heads;
pub mod hyper;
pub mod lattice;
pub mod levels;
pub mod linear;
pub mod loss;
pub mod low_rank;
pub mod norm;
#[cfg(test)]
mod plain;
pub mod pool;
pub mod refine;
pub mod rope;
pub mod round;
pub mod round_activations;
pub mod scaled;
pub mod softcap;
pub mod sparse;
pub mod streams;
pub mod sweep;
pub mod widen;

/// A pointer that tasks writing to disjoint parts of one buffer may share.
#[derive(Clone, Copy)]
pub(crate) struct Shared<T>(*mut T);

// SAFETY: whoever makes one promises that tasks touch disjoint elements.
unsafe impl<T> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Shared<T> {}

impl<T> Shared<T> {
    pub(crate) fn new(data: &mut [T]) -> Self {
        Shared(data.as_mut_ptr())
    }

    /// # Safety
    /// `offset` lies in the buffer that this was made from.
    pub(crate) unsafe fn at(&self, offset: usize) -> *mut T {
        // SAFETY: the caller's promise.
        unsafe { self.0.add(offset) }
    }
}

/// `c ← a·b + keep·c` on strided operands, one thread: `a` is `[m, k]`, `b` `[k, n]`, `c` `[m, n]`.
///
/// # Safety
/// The pointers and strides (in elements, `[row, column]`) describe memory that is valid for the shapes; `c` is not shared.
pub(crate) unsafe fn gemm<T: 'static>(
    [m, n, k]: [usize; 3],
    c: *mut T,
    c_strides: [usize; 2],
    keep: bool,
    a: *const T,
    a_strides: [usize; 2],
    b: *const T,
    b_strides: [usize; 2],
    [one, alpha]: [T; 2],
) {
    // SAFETY: the caller's promise.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c,
            c_strides[1] as isize,
            c_strides[0] as isize,
            keep,
            a,
            a_strides[1] as isize,
            a_strides[0] as isize,
            b,
            b_strides[1] as isize,
            b_strides[0] as isize,
            one,
            alpha,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

#[cfg(test)]
pub(crate) mod testing {
    //! Small helpers for the tests of the operations.

    use formats::GgmlType;
    use ndarray::Array2;

    use crate::{FitKind, GridSpec, Quantize};

    /// A repeatable stream of numbers, roughly normal.
    pub struct Noise(pub u64);

    impl Noise {
        pub fn next(&mut self) -> f32 {
            let mut sum = 0.0;
            for _ in 0..4 {
                self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                sum += ((self.0 >> 40) as f32) / (1u64 << 24) as f32 - 0.5;
            }
            sum * 1.7
        }

        pub fn matrix(&mut self, rows: usize, cols: usize) -> Array2<f32> {
            Array2::from_shape_simple_fn((rows, cols), || self.next())
        }
    }

    /// What codes on a grid stand for: of ggml's blocks read back as a file's would be, of others value by value.
    pub fn dequantized(grid: &crate::Grid, codes: &[u8]) -> Vec<f32> {
        let Some(ty) = grid.spec.encoding.ggml_type() else {
            let (cols, groups) = (grid.cols(), grid.spec.groups());
            let value = |(at, code): (usize, &u8)| {
                let group = at / cols * groups + grid.spec.group_of[at % cols] as usize;
                grid.scales[group] * grid.spec.encoding.levels.level(*code) - grid.mins[group]
            };
            return codes.iter().enumerate().map(value).collect();
        };
        let mut bytes = vec![0; ty.row_bytes(codes.len()).unwrap()];
        ty.pack(&grid.blocks, codes, &mut bytes);
        let mut out = vec![0.0; codes.len()];
        ty.dequantize(&bytes, &mut out).unwrap();
        out
    }

    /// Scales of a type's blocks, without importance or with.
    pub fn fit_blocks<B: Quantize>(
        backend: &B,
        weight: &B::Matrix,
        ty: GgmlType,
        importance: Option<&[f32]>,
    ) -> crate::Result<crate::Grid> {
        let spec = GridSpec::of(ty.encoding(), backend.shape(weight)[1]);
        backend.fit(weight, &spec, importance.map_or(FitKind::MinMax, FitKind::Weighted))
    }

    pub fn close(found: &[f32], expected: &[f32], tolerance: f32) {
        assert_eq!(found.len(), expected.len());
        let scale = expected.iter().fold(1.0f32, |m, x| m.max(x.abs()));
        for (i, (f, e)) in found.iter().zip(expected).enumerate() {
            assert!((f - e).abs() <= tolerance * scale, "element {i}: {f}, expected {e} (largest {scale})");
        }
    }
}
