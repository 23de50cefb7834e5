/* Copies past the caches. A block that is put or got is not read again soon by this processor, and
   is larger than its caches are good for: plain stores would first read each line that they are
   about to overwrite. Several pages go side by side, so that several rows of memory are open. */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { LINE = 64, PAGE = 4096, PAGES = 4, CHUNK = PAGE * PAGES };

#ifndef __SSE2__
#error "not for this processor: memmove does"
#endif
#include <emmintrin.h>

static inline void copy_line(char *to, const char *from)
{
    __m128i parts[4];
    for (int at = 0; at < 4; at++)
        parts[at] = _mm_loadu_si128((const __m128i *)from + at);
    for (int at = 0; at < 4; at++)
        _mm_stream_si128((__m128i *)to + at, parts[at]);
}

/* As memcpy; when it returns, other processors see all of it before whatever is stored next. */
void kvstore_stream(void *target, const void *source, size_t size)
{
    char *to = target;
    const char *from = source;
    size_t head = -(uintptr_t)to & (LINE - 1);

    if (head > size)
        head = size;
    memcpy(to, from, head);
    to += head, from += head, size -= head;
    for (; size >= CHUNK; to += CHUNK, from += CHUNK, size -= CHUNK)
        for (size_t line = 0; line < PAGE; line += LINE)
            for (size_t page = line; page < CHUNK; page += PAGE)
                copy_line(to + page, from + page);
    _mm_sfence();
    memcpy(to, from, size);
}
