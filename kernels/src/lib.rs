//! Number crunching on a device, behind one small trait; every operation beside its scalar reference.
