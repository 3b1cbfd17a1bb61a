from guided_diffusion.commands.train import run

if __name__ == "__main__":
    run()
