//! Weights that are sent ahead of their use.

use std::sync::Arc;

use formats::Dtype;

use super::on_all;
use crate::backend::Memory;
use crate::cuda::{Cuda, Device, Simulated};
use crate::ops::testing::Noise;

/// Finite numbers as a file stores them.
fn stored(noise: &mut Noise, dtype: Dtype, count: usize) -> Vec<u8> {
    let number = |x: f32| match dtype {
        // Of an exponent that is all ones one bit is cleared.
        Dtype::F16 => ((x.to_bits() >> 12) as u16 & 0xbfff).to_le_bytes().to_vec(),
        Dtype::BF16 => ((x.to_bits() >> 16) as u16).to_le_bytes().to_vec(),
        _ => x.to_le_bytes().to_vec(),
    };
    (0..count).flat_map(|_| number(noise.next())).collect()
}

/// A simulated device with so many bytes, all of which may be used; no kernel need be compiled for it.
fn small(bytes: usize) -> (Arc<Simulated>, Cuda) {
    let device = Arc::new(Simulated::with_memory(0, bytes));
    (device.clone(), Cuda::new(device, Some(bytes as u64)).unwrap())
}

#[test]
fn what_is_sent_ahead_is_what_is_uploaded() {
    let mut noise = Noise(81);
    for (dtype, [rows, cols]) in [
        (Dtype::F16, [3, 7]),
        (Dtype::BF16, [64, 130]),
        (Dtype::F32, [5, 1]),
        (Dtype::BF16, [0, 4]),
        // More than one piece of the smaller size.
        (Dtype::BF16, [260, 257]),
    ] {
        let bytes = stored(&mut noise, dtype, rows * cols);
        let found = on_all(|cuda| {
            let mut sent = Vec::new();
            for _ in 0..3 {
                sent.push(cuda.send_ahead(&bytes, dtype, [rows, cols]).unwrap().expect("there is room"));
            }
            let values = |matrix| cuda.download(&matrix).unwrap().mapv(f32::to_bits);
            let expected = values(cuda.upload_stored(&bytes, dtype, [rows, cols]).unwrap().unwrap());
            for sent in sent {
                assert_eq!(values(cuda.widen(sent).unwrap()), expected);
            }
            expected
        });
        if found.is_none() {
            return;
        }
    }
    let (_, cuda) = small(1 << 16);
    assert!(cuda.send_ahead(&[0; 8], Dtype::F64, [1, 1]).unwrap().is_none());
    cuda.send_ahead(&[0; 8], Dtype::F32, [1, 1]).unwrap_err();
    assert_eq!(cuda.usage().ahead, 0);
}

#[test]
fn what_is_never_used_is_given_back() {
    let (device, cuda) = small(1 << 16);
    let bytes = [7; 8192];
    for _ in 0..100 {
        let sent = cuda.send_ahead(&bytes, Dtype::BF16, [64, 64]).unwrap().expect("there is room");
        assert_eq!(device.capacity().unwrap().free, (1 << 16) - 8192);
        drop(sent);
    }
    assert_eq!(device.capacity().unwrap().free, 1 << 16);
    assert_eq!(cuda.usage().ahead, 100 * 8192);
}

#[test]
fn nothing_makes_room_for_what_is_sent_ahead() {
    let (_, cuda) = small(1 << 16);
    assert_eq!(cuda.sends_ahead(), Some(1 << 14));
    let bytes: Vec<u8> = (0..16_384u32).map(|i| (i * 7 % 251) as u8).collect();
    let sent = cuda.send_ahead(&bytes, Dtype::BF16, [64, 128]).unwrap().expect("there is room");
    // What is at work has what it needs: that which only came ahead makes room.
    let work = cuda.zeros(1, 56 << 8).unwrap();
    assert_eq!(cuda.usage().moved, 16_384);
    assert!(cuda.send_ahead(&bytes, Dtype::BF16, [64, 128]).unwrap().is_none());
    drop(work);
    assert_eq!(cuda.fetch::<u8>(&sent.buffer, bytes.len()).unwrap(), bytes);
    // A device that others use may have less.
    let device = Arc::new(Simulated::with_memory(0, 1 << 16));
    let [first, second] = [(); 2].map(|()| Cuda::new(device.clone(), Some(1 << 16)).unwrap());
    let taken = first.zeros(1, 60 << 8).unwrap();
    assert!(second.send_ahead(&bytes, Dtype::BF16, [64, 128]).unwrap().is_none());
    drop(taken);
    assert!(second.send_ahead(&bytes, Dtype::BF16, [64, 128]).unwrap().is_some());
}

#[test]
fn one_thread_sends_while_another_needs_all_the_memory() {
    let (device, cuda) = small(1 << 16);
    std::thread::scope(|scope| {
        let sender = scope.spawn(|| {
            let mut sent = std::collections::VecDeque::new();
            for turn in 0..2000u32 {
                let bytes = [turn as u8; 12_288];
                sent.extend(cuda.send_ahead(&bytes, Dtype::BF16, [96, 64]).unwrap().map(|s| (turn as u8, s)));
                if sent.len() > 2 {
                    let (value, oldest) = sent.pop_front().expect("three");
                    if turn.is_multiple_of(2) {
                        assert_eq!(cuda.fetch::<u8>(&oldest.buffer, 12_288).unwrap(), [value; 12_288]);
                    }
                }
            }
        });
        while !sender.is_finished() {
            // Half of it is in use by the sender at most.
            let work = cuda.cleared::<u8>(28 << 10).unwrap();
            assert!(cuda.fetch::<u8>(&work, 28 << 10).unwrap().iter().all(|b| *b == 0));
        }
    });
    assert_eq!(device.capacity().unwrap().free, 1 << 16);
}
