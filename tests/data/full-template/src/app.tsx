import { Route, Routes } from "react-router"
import { Nav } from "@/components/nav"
import { Board } from "@/pages/board"
import { Home } from "@/pages/home"
import { Parts } from "@/pages/parts"

export function App() {
  return (
    <div className="mx-auto max-w-5xl p-6">
      <Nav />
      <Routes>
        <Route path="/" element={<><Home /><Board /><Parts /></>} />
      </Routes>
    </div>
  )
}
