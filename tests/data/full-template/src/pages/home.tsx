export function Home() {
  return (
    <section className="py-12 text-center">
      <h1 className="text-4xl font-semibold">A full application</h1>
      <p id="mark">mark 0</p>
    </section>
  )
}
