import useEmblaCarousel from "embla-carousel-react"
import type { ReactNode } from "react"

export function Carousel({ slides }: { slides: ReactNode[] }) {
  const [viewport] = useEmblaCarousel({ loop: true })
  return (
    <div ref={viewport} className="overflow-hidden">
      <div className="flex">
        {slides.map((slide, index) => (
          <div key={index} className="min-w-0 flex-[0_0_100%]">
            {slide}
          </div>
        ))}
      </div>
    </div>
  )
}
