//! What goes to the host and comes back where there is too little memory.

use std::sync::Arc;

use crate::cuda::memory::Buffer;
use crate::cuda::{Cuda, Simulated};

const BYTES: usize = 1 << 13;

/// A device that holds so many buffers, and others in which their number stands.
fn scanned(held: usize, all: usize) -> (Arc<Simulated>, Cuda, Vec<Buffer>) {
    let device = Arc::new(Simulated::new(0));
    let cuda = Cuda::new(device.clone(), Some((held * BYTES) as u64)).unwrap();
    let buffers = (0..all).map(|number| cuda.send(&vec![number as u8; BYTES]).unwrap()).collect();
    (device, cuda, buffers)
}

#[test]
fn scans_in_turn_bring_back_little_more_than_what_does_not_fit() {
    let (held, all, scans) = (40, 48, 30);
    let (device, cuda, buffers) = scanned(held, all);
    let weight = cuda.send(&[77u8; BYTES]).unwrap();
    for _ in 0..scans {
        for buffer in &buffers {
            // What every step reads stays, and so do what it makes and reads again.
            let made = cuda.buffer::<u8>(BYTES).unwrap();
            for _ in 0..2 {
                drop((buffer.pin_to_read().unwrap(), weight.pin_to_read().unwrap(), made.pin().unwrap()));
            }
        }
    }
    let [out, back] = device.copies();
    println!("{out} copies to the host, {back} back");
    // Two places are the weight's and that of what a step makes, and a few those of what was at work just now.
    let missing = all - (held - 2);
    assert!(back <= (missing + 6) * scans + all, "{back} copies back in {scans} scans");
    assert!(out <= all + 1, "{out} copies to the host of what is only read");
    for (number, buffer) in buffers.iter().enumerate() {
        assert_eq!(cuda.fetch::<u8>(buffer, BYTES).unwrap(), [number as u8; BYTES]);
    }
}

#[test]
fn what_is_written_again_is_put_aside_again() {
    let (device, cuda, buffers) = scanned(3, 6);
    for turn in 1..20u8 {
        for (number, buffer) in buffers.iter().enumerate() {
            assert_eq!(cuda.fetch::<u8>(buffer, BYTES).unwrap(), [number as u8 * turn; BYTES], "{turn}");
            let value = number as u8 * (turn + 1);
            cuda.device().write(buffer.pin().unwrap().at, &[value; BYTES]).unwrap();
        }
    }
    let [out, back] = device.copies();
    assert!(out >= back && back > 19, "{out} to the host and {back} back");
    assert!(cuda.usage().moved == (out * BYTES) as u64 && cuda.usage().returned == (back * BYTES) as u64);
}

/// Whoever writes to what was pinned to be read is found out, in every test on the simulated device.
#[test]
#[should_panic(expected = "what was pinned to be read was written")]
fn writing_to_what_is_only_to_be_read_is_found_out() {
    let (_, cuda, buffers) = scanned(3, 1);
    let pinned = buffers[0].pin_to_read().unwrap();
    cuda.device().write(pinned.at, &[9; BYTES]).unwrap();
    drop(pinned);
}
