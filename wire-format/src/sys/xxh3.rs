//! xxh3 with 128 bits over one page, with the widest vectors that this processor has.
//!
//! `xxhash-rust` chooses its vectors when it is compiled, so that a build for every x86-64 has those of SSE2. A page's
//! digest is computed at least twice for each page that is sent, and is most of what the engine does besides copying:
//! here it is computed with AVX-512 or AVX2 where they are found at run time. The algorithm is the reference's
//! for an input of 4096 bytes, no seed and the default secret (<https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md>,
//! "XXH3 algorithm, large inputs"): four blocks of 16 stripes of 64 bytes, of which the last stripe is taken with a secret of its own.

use crate::limits::PAGE_SIZE;

/// The digest of a page, or `None` where the processor has neither AVX-512 nor AVX2.
#[inline]
pub(crate) fn page_digest(page: &[u8; PAGE_SIZE]) -> Option<u128> {
    #[cfg(target_arch = "x86_64")]
    {
        if std::arch::is_x86_feature_detected!("avx512f") {
            // SAFETY: the function asks for nothing but AVX-512F, which the line above found.
            return Some(unsafe { x86::avx512(page) });
        }
        if std::arch::is_x86_feature_detected!("avx2") {
            // SAFETY: the function asks for nothing but AVX2, which the line above found.
            return Some(unsafe { x86::avx2(page) });
        }
    }
    let _ = page;
    None
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::PAGE_SIZE;
    use std::arch::x86_64::{
        __m256i, __m512i, _mm256_add_epi64, _mm256_loadu_si256, _mm256_mul_epu32, _mm256_set1_epi64x,
        _mm256_setzero_si256, _mm256_shuffle_epi32, _mm256_slli_epi64, _mm256_srli_epi64,
        _mm256_storeu_si256, _mm256_xor_si256, _mm512_add_epi64, _mm512_loadu_si512, _mm512_mul_epu32,
        _mm512_set1_epi64, _mm512_setzero_si512, _mm512_shuffle_epi32, _mm512_slli_epi64, _mm512_srli_epi64,
        _mm512_storeu_si512, _mm512_xor_si512,
    };

    /// Bytes that go into all eight accumulators at once.
    const STRIPE: usize = 64;
    /// How far the secret moves on from stripe to stripe.
    const SECRET_STEP: usize = 8;
    /// Stripes until the secret is used up and the accumulators are scrambled.
    const BLOCK_STRIPES: usize = (SECRET.len() - STRIPE) / SECRET_STEP;
    const BLOCK: usize = BLOCK_STRIPES * STRIPE;
    /// Blocks that are scrambled: all but that which the end of the input lies in.
    const BLOCKS: usize = (PAGE_SIZE - 1) / BLOCK;
    /// Whole stripes in the last block, without the last 64 bytes of the input.
    const LAST_STRIPES: usize = ((PAGE_SIZE - 1) - BLOCKS * BLOCK) / STRIPE;
    /// Where in the secret that of the last stripe begins.
    const LAST_SECRET: usize = SECRET.len() - STRIPE - 7;
    /// Where in the secret those of the two halves of the result begin.
    const LOW_SECRET: usize = 11;
    const HIGH_SECRET: usize = SECRET.len() - STRIPE - 11;

    const PRIME32_1: u64 = 0x9E37_79B1;
    const PRIME32_2: u64 = 0x85EB_CA77;
    const PRIME32_3: u64 = 0xC2B2_AE3D;
    const PRIME64_1: u64 = 0x9E37_79B1_85EB_CA87;
    const PRIME64_2: u64 = 0xC2B2_AE3D_27D4_EB4F;
    const PRIME64_3: u64 = 0x1656_67B1_9E37_79F9;
    const PRIME64_4: u64 = 0x85EB_CA77_C2B2_AE63;
    const PRIME64_5: u64 = 0x27D4_EB2F_1656_67C5;
    const AVALANCHE: u64 = 0x1656_6791_9E37_79F9;

    /// The eight accumulators.
    type Lanes = [u64; 8];

    const START: Lanes =
        [PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3, PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1];

    /// The default secret of xxh3.
    const SECRET: [u8; 192] = [
        0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c, 0xde,
        0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f, 0xcb, 0x79,
        0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21, 0xb8, 0x08, 0x46,
        0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c, 0x3c, 0x28, 0x52, 0xbb,
        0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3, 0x71, 0x64, 0x48, 0x97, 0xa2,
        0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8, 0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c,
        0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d, 0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59,
        0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64, 0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3,
        0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb, 0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3,
        0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e, 0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8,
        0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce, 0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb,
        0xca, 0xbb, 0x4b, 0x40, 0x7e,
    ];

    /// Which 32-bit words of a vector change places, for the 64-bit ones to do so in pairs.
    const SWAP_PAIRS: i32 = 0b01_00_11_10;

    #[inline]
    fn at<const N: usize>(bytes: &[u8], from: usize) -> &[u8; N] {
        bytes[from..].first_chunk().expect("all places are constants within the page or the secret")
    }

    // In both: the reference adds to an accumulator, with each stripe, its product and its data with neighbours swapped. Sums
    // of swapped data are a swapped sum: it is swapped once a block, and the sums of a block hang on nothing before.

    #[target_feature(enable = "avx512f")]
    pub(super) fn avx512(page: &[u8; PAGE_SIZE]) -> u128 {
        let prime = _mm512_set1_epi64(PRIME32_1.cast_signed());
        let scramble = load512(at(&SECRET, SECRET.len() - STRIPE));
        let mut sum = load512_lanes(&START);
        let add = |sum: __m512i, products: __m512i, data: __m512i| {
            _mm512_add_epi64(sum, _mm512_add_epi64(products, _mm512_shuffle_epi32::<SWAP_PAIRS>(data)))
        };
        let step = |(products, sums): (__m512i, __m512i), from: usize, secret: usize| {
            let data = load512(at(page, from));
            let key = _mm512_xor_si512(data, load512(at(&SECRET, secret)));
            let product = _mm512_mul_epu32(key, _mm512_srli_epi64::<32>(key));
            (_mm512_add_epi64(products, product), _mm512_add_epi64(sums, data))
        };
        for block in 0..BLOCKS {
            let mut sums = (_mm512_setzero_si512(), _mm512_setzero_si512());
            for stripe in 0..BLOCK_STRIPES {
                sums = step(sums, block * BLOCK + stripe * STRIPE, stripe * SECRET_STEP);
            }
            sum = add(sum, sums.0, sums.1);
            let mixed = _mm512_xor_si512(_mm512_xor_si512(sum, _mm512_srli_epi64::<47>(sum)), scramble);
            let low = _mm512_mul_epu32(mixed, prime);
            let high = _mm512_mul_epu32(_mm512_srli_epi64::<32>(mixed), prime);
            sum = _mm512_add_epi64(low, _mm512_slli_epi64::<32>(high));
        }
        let mut sums = (_mm512_setzero_si512(), _mm512_setzero_si512());
        for stripe in 0..LAST_STRIPES {
            sums = step(sums, BLOCKS * BLOCK + stripe * STRIPE, stripe * SECRET_STEP);
        }
        sums = step(sums, PAGE_SIZE - STRIPE, LAST_SECRET);
        sum = add(sum, sums.0, sums.1);
        let mut lanes: Lanes = [0; 8];
        // SAFETY: writes 64 bytes, unaligned, which `lanes` has.
        unsafe { _mm512_storeu_si512(lanes.as_mut_ptr().cast(), sum) };
        finish(&lanes)
    }

    #[target_feature(enable = "avx512f")]
    #[inline]
    fn load512(bytes: &[u8; STRIPE]) -> __m512i {
        // SAFETY: reads 64 bytes, unaligned, which the reference has.
        unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) }
    }

    #[target_feature(enable = "avx512f")]
    #[inline]
    fn load512_lanes(lanes: &Lanes) -> __m512i {
        // SAFETY: reads 64 bytes, unaligned, which the reference has.
        unsafe { _mm512_loadu_si512(lanes.as_ptr().cast()) }
    }

    #[target_feature(enable = "avx2")]
    pub(super) fn avx2(page: &[u8; PAGE_SIZE]) -> u128 {
        const HALF: usize = STRIPE / 2;
        let prime = _mm256_set1_epi64x(PRIME32_1.cast_signed());
        let scramble_at = SECRET.len() - STRIPE;
        let (first, second) = START.split_at(4);
        let mut sums = [load256_lanes(at_lanes(first)), load256_lanes(at_lanes(second))];
        let add = |sum: __m256i, products: __m256i, data: __m256i| {
            _mm256_add_epi64(sum, _mm256_add_epi64(products, _mm256_shuffle_epi32::<SWAP_PAIRS>(data)))
        };
        let zero = _mm256_setzero_si256();
        let step = |(products, sums): (__m256i, __m256i), from: usize, secret: usize| {
            let data = load256(at(page, from));
            let key = _mm256_xor_si256(data, load256(at(&SECRET, secret)));
            let product = _mm256_mul_epu32(key, _mm256_srli_epi64::<32>(key));
            (_mm256_add_epi64(products, product), _mm256_add_epi64(sums, data))
        };
        let scramble = |sum: __m256i, secret: usize| {
            let secret = load256(at(&SECRET, secret));
            let mixed = _mm256_xor_si256(_mm256_xor_si256(sum, _mm256_srli_epi64::<47>(sum)), secret);
            let low = _mm256_mul_epu32(mixed, prime);
            let high = _mm256_mul_epu32(_mm256_srli_epi64::<32>(mixed), prime);
            _mm256_add_epi64(low, _mm256_slli_epi64::<32>(high))
        };
        let both = |[first, second]: [(__m256i, __m256i); 2], from: usize, secret: usize| {
            [step(first, from, secret), step(second, from + HALF, secret + HALF)]
        };
        let add_both = |sums: [__m256i; 2], [first, second]: [(__m256i, __m256i); 2]| {
            [add(sums[0], first.0, first.1), add(sums[1], second.0, second.1)]
        };
        for block in 0..BLOCKS {
            let mut own = [(zero, zero); 2];
            for stripe in 0..BLOCK_STRIPES {
                own = both(own, block * BLOCK + stripe * STRIPE, stripe * SECRET_STEP);
            }
            sums = add_both(sums, own);
            sums = [scramble(sums[0], scramble_at), scramble(sums[1], scramble_at + HALF)];
        }
        let mut own = [(zero, zero); 2];
        for stripe in 0..LAST_STRIPES {
            own = both(own, BLOCKS * BLOCK + stripe * STRIPE, stripe * SECRET_STEP);
        }
        sums = add_both(sums, both(own, PAGE_SIZE - STRIPE, LAST_SECRET));
        let mut lanes: Lanes = [0; 8];
        let (first, second) = lanes.split_at_mut(4);
        // SAFETY: writes 32 bytes, unaligned, which half of eight lanes has.
        unsafe { _mm256_storeu_si256(first.as_mut_ptr().cast(), sums[0]) };
        // SAFETY: as above.
        unsafe { _mm256_storeu_si256(second.as_mut_ptr().cast(), sums[1]) };
        finish(&lanes)
    }

    #[inline]
    fn at_lanes(lanes: &[u64]) -> &[u64; 4] {
        lanes.first_chunk().expect("half of eight")
    }

    #[target_feature(enable = "avx2")]
    #[inline]
    fn load256(bytes: &[u8; STRIPE / 2]) -> __m256i {
        // SAFETY: reads 32 bytes, unaligned, which the reference has.
        unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
    }

    #[target_feature(enable = "avx2")]
    #[inline]
    fn load256_lanes(lanes: &[u64; 4]) -> __m256i {
        // SAFETY: reads 32 bytes, unaligned, which the reference has.
        unsafe { _mm256_loadu_si256(lanes.as_ptr().cast()) }
    }

    /// Makes the two halves of the result of the eight accumulators.
    #[inline]
    fn finish(lanes: &Lanes) -> u128 {
        let len = PAGE_SIZE as u64;
        let low = merge(lanes, LOW_SECRET, len.wrapping_mul(PRIME64_1));
        let high = merge(lanes, HIGH_SECRET, !len.wrapping_mul(PRIME64_2));
        u128::from(high) << 64 | u128::from(low)
    }

    #[inline]
    fn merge(lanes: &Lanes, secret: usize, start: u64) -> u64 {
        let word = |index: usize| lanes[index] ^ u64::from_le_bytes(*at(&SECRET, secret + 8 * index));
        let folded = (0..4).fold(start, |sum, pair| {
            let product = u128::from(word(2 * pair)) * u128::from(word(2 * pair + 1));
            sum.wrapping_add(product as u64 ^ (product >> 64) as u64)
        });
        let mixed = (folded ^ (folded >> 37)).wrapping_mul(AVALANCHE);
        mixed ^ (mixed >> 32)
    }

    #[cfg(test)]
    mod tests {
        use super::*;
        use proptest::prelude::*;
        use xxhash_rust::xxh3::xxh3_128;

        fn agree(page: &[u8; PAGE_SIZE]) {
            let expected = xxh3_128(page);
            let mut ran = 0;
            if std::arch::is_x86_feature_detected!("avx512f") {
                // SAFETY: the processor has what the function asks for.
                assert_eq!(unsafe { avx512(page) }, expected, "AVX-512");
                ran += 1;
            }
            if std::arch::is_x86_feature_detected!("avx2") {
                // SAFETY: the processor has what the function asks for.
                assert_eq!(unsafe { avx2(page) }, expected, "AVX2");
                ran += 1;
            }
            assert_eq!(super::super::page_digest(page), (ran > 0).then_some(expected));
        }

        #[test]
        fn pages_of_one_byte_agree_with_the_library() {
            for byte in 0..=255 {
                agree(&[byte; PAGE_SIZE]);
            }
        }

        #[test]
        fn every_byte_of_a_page_counts_as_in_the_library() {
            for place in 0..PAGE_SIZE {
                let mut page = [0; PAGE_SIZE];
                page[place] = 0x80;
                agree(&page);
            }
        }

        proptest! {
            #[test]
            fn any_page_agrees_with_the_library(page in proptest::collection::vec(any::<u8>(), PAGE_SIZE)) {
                agree(page.as_slice().try_into().expect("as long as a page"));
            }
        }
    }
}
