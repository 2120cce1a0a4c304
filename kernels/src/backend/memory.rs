//! Matrices on a device: how they get there and back, and what room they have.

use formats::{Dtype, PackedWeight, WordLayout};
use ndarray::Array2;

use crate::Result;
use crate::checks::no_room;

/// One device and what lies on it. Matrices are `f32`, row-major, resident on the device; activations are `[tokens, features]`.
pub trait Memory: Sync {
    /// A matrix on the device.
    type Matrix: Send + Sync;
    /// An activation in the form that products read it in.
    type Input: Send + Sync;
    /// A matrix as a file stores it, on its way to the device.
    type Stored: Send + Sync;

    /// What the user should see: device and instruction set.
    fn name(&self) -> String;
    /// The same device where the operands of products may be kept in bfloat16 if that is faster: good for calibration,
    /// not for measuring.
    fn relaxed(&self) -> Self
    where
        Self: Sized;
    /// Bytes of memory it may use, where that is not the host's.
    fn room(&self) -> Option<u64> {
        None
    }
    /// Tokens that go through an operator together, unless one sequence is longer.
    fn tokens_at_once(&self) -> usize {
        2048
    }
    /// Values of an activation that are kept between two uses of it; more are computed twice.
    fn kept_values(&self) -> usize {
        1 << 29
    }
    /// Bytes that a value of an [input](Self::Input) takes.
    fn bytes_of_input(&self) -> usize {
        4
    }
    /// What the user should know of how the work went, for the report.
    fn notes(&self) -> Vec<String> {
        Vec::new()
    }

    /// A matrix as a file stores it, row-major and little-endian, widened on the device; `None` where the caller is to widen it.
    fn upload_stored(&self, bytes: &[u8], dtype: Dtype, shape: [usize; 2]) -> Result<Option<Self::Matrix>> {
        let _ = (bytes, dtype, shape);
        Ok(None)
    }
    /// Bytes of stored matrices that may be on their way at a time; `None` where nothing is gained by sending them ahead.
    fn sends_ahead(&self) -> Option<u64> {
        None
    }
    /// Sends a matrix as a file stores it, beside the work that was asked for; `bytes` may be reused at once. `None` where there is
    /// no room for it now, or the caller is to widen it.
    fn send_ahead(&self, bytes: &[u8], dtype: Dtype, shape: [usize; 2]) -> Result<Option<Self::Stored>> {
        let _ = (bytes, dtype, shape);
        Ok(None)
    }
    /// What [`upload_stored`](Self::upload_stored) gives, of what was sent ahead.
    fn widen(&self, stored: Self::Stored) -> Result<Self::Matrix>;

    /// Copies a host matrix to the device.
    fn upload(&self, host: Array2<f32>) -> Result<Self::Matrix>;
    /// The reals `[rows, cols]` of a weight whose codes lie in words as files hold them; fails where `layout` has no room for such codes,
    /// or their number is another.
    fn upload_packed(&self, weight: PackedWeight, layout: WordLayout) -> Result<Self::Matrix> {
        let weight = weight.unpacked(layout).map_err(|error| no_room("upload_packed", &error))?;
        let values = Array2::from_shape_vec((weight.rows, weight.cols), weight.dequantize());
        self.upload(values.expect("one value for each code"))
    }
    /// Copies a device matrix to the host.
    fn download(&self, matrix: &Self::Matrix) -> Result<Array2<f32>>;
    /// A matrix of zeros.
    fn zeros(&self, rows: usize, cols: usize) -> Result<Self::Matrix>;
    /// `[rows, cols]`.
    fn shape(&self, matrix: &Self::Matrix) -> [usize; 2];
    /// A copy of the whole.
    fn copy(&self, matrix: &Self::Matrix) -> Result<Self::Matrix>;
    /// A copy of the named rows.
    fn select_rows(&self, matrix: &Self::Matrix, rows: &[usize]) -> Result<Self::Matrix>;
    /// `matrix[i, j] ← matrix[i, j] · rows[i] · cols[j]`; an empty slice leaves that side alone.
    fn scale(&self, matrix: &mut Self::Matrix, rows: &[f32], cols: &[f32]) -> Result<()>;
    /// `y ← y + factor · x`.
    fn add_scaled(&self, x: &Self::Matrix, factor: f32, y: &mut Self::Matrix) -> Result<()>;
    /// `a − b`.
    fn difference(&self, a: &Self::Matrix, b: &Self::Matrix) -> Result<Self::Matrix>;
    /// Whether every value is finite.
    fn is_finite(&self, matrix: &Self::Matrix) -> Result<bool>;

    /// An activation `[tokens, features]`, ready to be multiplied.
    fn input(&self, x: Self::Matrix) -> Result<Self::Input>;
    /// The values of an activation, as a matrix again; rounded ones stay as they were rounded.
    fn values(&self, x: &Self::Input) -> Result<Self::Matrix>;
    /// `[tokens, features]`.
    fn input_shape(&self, x: &Self::Input) -> [usize; 2];
}
